"""The shapes of real models: presets by name, and Hugging Face configs read into the same words."""
