"""What `diagnose` runs: models and drafts to trace, and the checks that explain a low acceptance."""
