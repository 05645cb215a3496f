"""Tokens guessed ahead: who guesses, how many, and what became of it. Integers only."""
