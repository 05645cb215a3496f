"""Scripted agents: what they say is written beforehand, how it is tokenized is not the tokenizer's
way."""
