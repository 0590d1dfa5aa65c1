"""The training program, and what follows each of its steps."""
