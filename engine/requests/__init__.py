"""Requests: their specification and its validation, and the state of a request in progress."""
