"""What the three stages agree on: the store, the SAE, the kernels, and the hooks. Imports no stage."""
