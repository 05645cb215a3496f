"""Prefill and decode apart: a prefix that one engine computed goes to another."""
