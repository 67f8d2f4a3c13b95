"""Global weights: what feeds each latent and what it feeds, over a corpus instead of a prompt."""
