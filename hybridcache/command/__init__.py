"""Parts that all commands share: version, extras, parser, signals, streams, texts of fields."""
