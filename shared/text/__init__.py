"""The text of a store's tokens: documents put together, where they begin, and what Python says of them."""
