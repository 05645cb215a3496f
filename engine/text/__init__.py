"""Text in, text out: tokenizers, chat templates, and the text of an answer as it grows."""
