"""What stands in an answer: reasoning, text and calls of tools, read from its text as it grows."""
