"""From Megatron-LM's command line to a configuration of ours. Torch-free."""
