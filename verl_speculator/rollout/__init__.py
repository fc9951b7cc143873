"""Serving engines: what each demands of a checkpoint."""
