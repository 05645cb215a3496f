"""Mixture of experts, with routing and grouped products: ``reference`` in plain PyTorch, ``fused``
in Triton."""
