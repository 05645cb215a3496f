"""Writes of new keys and values to the KV pool: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
