"""The field's established class names for writing a family: thin names over our rules.

A family that was written against them elsewhere loads unchanged, and is proven as ours are. New families are shorter in
our own terms: see `megatron.bridge.models.families.dense` and `megatron.bridge.models.fragments`.
"""
