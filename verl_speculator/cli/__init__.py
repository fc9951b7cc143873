"""The commands of `verl-speculator`, a module each. Heavy imports happen inside their functions."""
