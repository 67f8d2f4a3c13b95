"""Images of a store through a dictionary: the latents that fire in a box, the regions on which a latent fires."""
