"""Kinds of dictionary: one file for each."""
