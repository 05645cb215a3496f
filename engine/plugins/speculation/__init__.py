"""Speculative decoding: drafters, draft lengths and acceptance statistics."""
