"""Runs of simulations: one, a sweep, a closed loop, several replicas."""
