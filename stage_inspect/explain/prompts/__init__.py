"""The prompts, a text file each: package data, so that a score can name the exact text that it was asked with."""
