"""The processes of one run: who is who, who hangs, how all end."""
