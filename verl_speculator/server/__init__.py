"""A small OpenAI-compatible server with a chat page, to try and demonstrate a speculator."""
