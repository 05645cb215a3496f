"""Disaggregation: prefixes computed by one engine are sent to another."""
