"""Disk tier: KV and states in files that outlive the process, and their fingerprint."""
