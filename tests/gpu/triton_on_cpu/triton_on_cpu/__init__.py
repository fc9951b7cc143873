"""A backend of Triton that compiles nothing: with TRITON_INTERPRET=1 every kernel runs in Triton's interpreter."""
