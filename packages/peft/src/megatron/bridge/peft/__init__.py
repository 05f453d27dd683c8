"""Parameter-efficient fine-tuning methods on Megatron-Core models."""
