"""Eviction policies: one module per algorithm, and their shared base classes."""
