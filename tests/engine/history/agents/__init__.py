"""Scripted agents. Their texts are fixed, and their tokens differ from the tokenizer's own."""
