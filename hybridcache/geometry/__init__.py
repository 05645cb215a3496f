"""Model geometry: layer shapes of named presets and of Hugging Face configs, and their costs."""
