"""Bytes on disk that outlive the process: segments of records, and whose they are."""
