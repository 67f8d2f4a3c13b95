"""The pass: contexts to pairs (token, latent), pairs to a state per part of the store, parts to files."""
