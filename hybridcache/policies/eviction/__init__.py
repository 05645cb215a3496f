"""Eviction policies. ``scored`` and ``queues`` hold base classes and the policies built on them."""
