"""Explanations of latents, and how well they hold on documents that they were not made from."""
