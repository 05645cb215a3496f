"""Tensor parallelism: several processes that each compute a part of every layer."""
