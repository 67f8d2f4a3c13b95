"""From a store and a dictionary to what each latent does."""
