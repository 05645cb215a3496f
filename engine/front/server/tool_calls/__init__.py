"""Calls of tools in the texts of answers."""
