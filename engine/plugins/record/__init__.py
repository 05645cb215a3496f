"""A proxy that writes what passes through it as a trace for the laboratory."""
