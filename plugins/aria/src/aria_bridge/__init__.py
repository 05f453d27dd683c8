"""Aria's language model for Megatron Bridge."""
