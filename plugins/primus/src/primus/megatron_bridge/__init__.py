"""The framework `megatron_bridge`: an adapter, the builder of its arguments, its trainer, and its patches."""
