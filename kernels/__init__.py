"""Kernels of hybrid models: functions of tensors, independent of the engine.

Each folder has a plain PyTorch ``reference`` next to its Triton kernel.
"""
