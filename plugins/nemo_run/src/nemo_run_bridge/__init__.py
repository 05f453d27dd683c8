"""Runs of Megatron Bridge, started by NeMo-Run."""
