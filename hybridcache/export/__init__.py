"""Data that leaves the process: events, mirrors that follow them, block hashes and snapshots."""
