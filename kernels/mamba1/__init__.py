"""Mamba-1's selective scan, in plain PyTorch only: every channel of a state decays on its own, so
no product of matrices computes a tile."""
