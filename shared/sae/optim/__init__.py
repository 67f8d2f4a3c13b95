"""Optimisers for dictionaries: one file for each."""
