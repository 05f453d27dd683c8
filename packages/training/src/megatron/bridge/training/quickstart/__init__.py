"""The main job as one command: a Hugging Face model to Megatron, trained in parallel on real text, and back, proven."""
