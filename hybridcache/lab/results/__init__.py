"""Results of simulations, and their tables and figures."""
