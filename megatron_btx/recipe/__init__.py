"""Recipes: what to train, mix and evaluate (schema), as a graph of commands (planner), run on this machine (runner)."""
