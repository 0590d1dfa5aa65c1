"""Checkpoints: the name table, readers and writers, and what their stored arguments mean."""
