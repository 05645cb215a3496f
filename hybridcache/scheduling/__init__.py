"""Scheduling without tensors: which requests are computed in a step, and the memory they claim.

The engine and the closed-loop simulator run this same code, so a policy behaves alike in both.
"""
