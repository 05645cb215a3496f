"""HTTP server with OpenAI's API. It uses AsyncEngine, texts and plain data only."""
