"""Mixture of experts, routing and grouped products: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
