"""Admission policies: which waiting request is admitted first, and which must wait."""
