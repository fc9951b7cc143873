"""Measuring a speculator: prompts and held-out text in, numbers out."""
