"""Parts that all commands share: version and extras, parser, signals and streams."""
