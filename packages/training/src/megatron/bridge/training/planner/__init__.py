"""What a run will take before it is started: parameters, memory, operations, communication, time; and good layouts.

Everything here is arithmetic on a model's sizes: no torch, no weights, no network.
"""
