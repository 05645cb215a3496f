"""Kernels of the hybrid model: tensors in, tensors out. Imports nothing of ours; each folder has a
plain reference beside its Triton kernel."""
