"""Inspection: one pass over a store with a dictionary, to the latents folder that says what each latent does."""
