"""A request: what may be asked, how it is checked, and how far it has come."""
