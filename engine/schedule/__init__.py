"""Who computes what in the next step, and with which memory. Integers only: no torch."""
