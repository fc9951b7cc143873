"""Checkpoints of a speculator, and the record of what they were trained from."""
