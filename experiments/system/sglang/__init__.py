"""SGLang's published package on a CPU: its cache beside ours, its scheduler on ours."""
