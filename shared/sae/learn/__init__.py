"""Learning a dictionary: starting values, losses, what they must know of the batch, dead latents."""
