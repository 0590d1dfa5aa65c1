"""From text to what Megatron trains on: indexed datasets."""
