"""Text processing: tokenizers, chat templates, and the text of growing answers."""
