"""Weights: readers of config.json and weight files, 8-bit formats, and conversion to 8 bits."""
