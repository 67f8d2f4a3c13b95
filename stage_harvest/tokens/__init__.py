"""From documents to packed contexts of token ids."""
