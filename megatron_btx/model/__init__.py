"""What is trained: the model's parts that Megatron-core leaves open, and how it is built and stepped."""
