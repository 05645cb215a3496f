"""Gated activations: ``reference`` in plain PyTorch, ``fused`` in Triton."""
