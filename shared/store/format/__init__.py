"""What a store's bytes mean: plan, keys, shards, manifests, types, checksums."""
