"""The drafter inside vLLM, and the update of its weights."""
