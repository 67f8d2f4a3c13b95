"""Scores of trained SAEs: reconstruction on held-out activations, next-token loss with the SAE spliced in, reports."""
