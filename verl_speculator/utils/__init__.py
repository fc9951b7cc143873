"""Errors, files, progress and processes: what every other folder may use."""
