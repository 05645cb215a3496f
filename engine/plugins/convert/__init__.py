"""Conversion of the weights of a model to eight bits."""
