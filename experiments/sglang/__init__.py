"""SGLang's published package on a CPU: its cache, and its scheduler on this cache."""
