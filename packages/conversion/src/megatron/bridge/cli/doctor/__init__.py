"""`megatron-bridge doctor`: what this installation can do, what is broken and why, and how to get what is absent."""
