"""The recipe: read from YAML, checked, with every unknown key refused."""
