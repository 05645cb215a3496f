"""Models and tokenizers of the Hugging Face Hub."""
