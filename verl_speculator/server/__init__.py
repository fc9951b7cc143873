"""A small server that speaks OpenAI's API, for trying a speculator and showing what it brings."""
