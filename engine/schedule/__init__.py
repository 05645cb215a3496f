"""Scheduling: selects the requests and token ranges of each step, on integers without torch."""
