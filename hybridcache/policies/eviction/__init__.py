"""Eviction policies. ``scored`` and ``queues`` hold base classes and the simple policies of each
kind; every other algorithm has a module."""
