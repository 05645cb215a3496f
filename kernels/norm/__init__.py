"""Root-mean-square norms: ``reference`` in plain PyTorch, ``fused`` in Triton."""
