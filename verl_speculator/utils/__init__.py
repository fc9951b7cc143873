"""Errors, files and processes: what every other folder may import."""
