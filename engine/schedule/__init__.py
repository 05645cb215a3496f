"""Scheduling: selects the requests and token ranges of each step. Works on integers without
torch."""
