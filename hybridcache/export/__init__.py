"""Data that leaves the process: events and mirrors that follow them."""
