"""From activations and a language model to figures."""
