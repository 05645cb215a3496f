"""Mamba-1's selective scan, in plain PyTorch only.

Every entry of a state decays at its own rate, so tiles cannot be computed as matrix products.
"""
