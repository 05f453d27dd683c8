"""One small module per family: what its Hugging Face config means to Megatron, and its weight table."""
