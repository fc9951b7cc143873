"""Settings: every `model.speculator.*` key, the table of families, the objective, and Hydra's composition."""
