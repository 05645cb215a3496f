"""Formats of traces, one small file each; ``mooncake.py`` is the model for a new one."""
