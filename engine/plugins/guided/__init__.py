"""Guided answers: answers that match a schema, an expression, a choice or a grammar."""
