"""Faults around a server, and a check that its memory is accounted for afterwards."""
