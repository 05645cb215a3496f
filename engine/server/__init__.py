"""The OpenAI-compatible front. It sees the AsyncEngine, texts and plain data."""
