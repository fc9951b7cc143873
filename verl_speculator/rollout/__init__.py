"""Serving engines: what each demands of a checkpoint, and our drafter in those that take one."""
