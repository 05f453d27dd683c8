"""Instruction data: rows of any format -> conversations -> text with marked answers -> tokens and what is trained.

Torch-free.
"""
