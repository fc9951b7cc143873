"""Checks of a training run in one light process, and the launcher that starts it."""
