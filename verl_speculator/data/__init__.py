"""Training data, before any training starts."""
