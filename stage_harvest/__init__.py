"""From a corpus to activations: documents, tokens, contexts, forward passes, shards. See docs/harvest.md."""
