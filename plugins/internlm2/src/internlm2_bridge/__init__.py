"""InternLM2 for Megatron Bridge."""
