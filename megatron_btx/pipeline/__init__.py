"""Recipes: what to train, mix and evaluate, as a graph of stages, run on this machine."""
