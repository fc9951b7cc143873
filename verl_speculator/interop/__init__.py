"""Checkpoints of other projects: import, export, model cards."""
