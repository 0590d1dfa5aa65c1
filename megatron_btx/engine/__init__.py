"""All that knows the inside of Megatron: its flags and their checks, its start, its stand-ins and repairs."""
