"""A run's directory, what it does with each stage, and the runner on this machine."""
