"""The base model: how it is loaded, its chat template, and the hidden states that a speculator reads."""
