"""The command line, a noun a file: what each command takes, and what it does."""
