"""Mamba-2, a state space with a scalar decay: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
