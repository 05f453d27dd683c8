"""`megatron-bridge recipes`: look at recipes, compare and copy them. Torch-free."""
