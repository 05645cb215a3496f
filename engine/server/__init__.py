"""The OpenAI-compatible front. It sees the AsyncEngine and nothing behind it."""
