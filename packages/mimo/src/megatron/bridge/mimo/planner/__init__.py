"""Where to put the modules of a model before anything is built: memory and time of placements, and the best of them.

Everything here is arithmetic on sizes, on the cost model of `megatron.bridge.training.planner`: no torch.
"""
