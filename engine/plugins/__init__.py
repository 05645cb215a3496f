"""Optional capabilities: each imports the core; the core imports none of them."""
