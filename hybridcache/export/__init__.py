"""What leaves the process: events, the mirror that follows them, block hashes, snapshots."""
