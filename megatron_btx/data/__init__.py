"""From text to what Megatron trains on: indexed datasets, and the corpora of the quickstart."""
