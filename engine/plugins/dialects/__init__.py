"""Anthropic's messages and OpenAI's responses, translated to and from chats."""
