"""The front of an engine: HTTP, processes, chat templates and the command line."""
