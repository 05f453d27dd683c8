"""Checkpoints in few bits, read as the weights they stand for; and FP8 block-scaled ones written on request.

The formats: FP8 in scaled blocks (DeepSeek), MXFP4 (GPT-OSS), and of compressed-tensors packed integers and scaled
floats. Whoever reads asks for names, shapes and regions as of a checkpoint in full precision.
"""
