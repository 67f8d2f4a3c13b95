"""From the parts of the pass to the arrays of a latents folder, and what the weights alone tell."""
