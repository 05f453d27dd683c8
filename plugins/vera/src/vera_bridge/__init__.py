"""VeRA for Megatron Bridge."""
