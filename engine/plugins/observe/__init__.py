"""Views of a running engine: the page, the terminal, the trace of its steps."""
