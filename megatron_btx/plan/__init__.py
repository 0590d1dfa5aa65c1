"""From a recipe to its stages: what each runs, is made from, and is decided by."""
