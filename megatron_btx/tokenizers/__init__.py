"""The tokenizers beside checkpoints: read, compared, and how they cut a text."""
