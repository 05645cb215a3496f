"""Readers of tool calls in the text of an answer, and grammars of calls."""
