"""A training loop on Megatron-Core that reads from top to bottom."""
