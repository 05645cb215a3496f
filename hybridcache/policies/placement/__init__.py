"""Checkpoint placement: rules, and their combination."""
