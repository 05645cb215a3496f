"""Simulation of several caches behind one router: hit rates and times to first token."""
