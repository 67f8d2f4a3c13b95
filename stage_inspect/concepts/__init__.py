"""Which latent stands for a concept: labels on the store's tokens, and how well each latent tells them."""
