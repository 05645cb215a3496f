"""SGLang's published package on a CPU: its cache for comparison, and its scheduler on this
cache."""
