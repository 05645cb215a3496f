"""Causal attention over a KV pool, read by index: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
