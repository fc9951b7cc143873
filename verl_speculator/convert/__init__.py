"""Medusa heads from elsewhere as checkpoints of ours."""
