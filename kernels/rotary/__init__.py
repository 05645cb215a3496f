"""Rotary position embedding: ``reference`` in plain PyTorch, ``fused`` in Triton."""
