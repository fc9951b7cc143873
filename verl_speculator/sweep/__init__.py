"""Many speculators for one base: each trained by the launcher, evaluated, and a row of one table."""
