"""From contexts of token ids to committed shards of activations."""
