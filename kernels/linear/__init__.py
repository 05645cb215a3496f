"""Linear layers with full and 8-bit weights: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
