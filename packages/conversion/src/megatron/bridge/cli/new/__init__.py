"""`megatron-bridge new`: a plugin package that passes its own tests, to begin one's own from."""
