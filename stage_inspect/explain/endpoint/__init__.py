"""Language models behind an OpenAI-compatible endpoint: requests, the client, the ceilings, the cache of answers."""
