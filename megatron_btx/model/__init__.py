"""The model's parts that Megatron-core leaves open: layers, and (later) routers, balancing losses and freezing."""
