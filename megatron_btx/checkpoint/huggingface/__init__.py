"""Hugging Face models: their families, configurations and keys, read and written, and what servers load."""
