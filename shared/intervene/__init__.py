"""A dictionary inside a language model: read its latents, change them, go on from the result."""
