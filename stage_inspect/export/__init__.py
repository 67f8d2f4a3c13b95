"""Doors out of a latents folder: the files of other projects, from what it holds."""
