"""Supervised scores: what latents say of labels that Python's own tokenizer gives, after SAEBench (Karvonen 2025)."""
