"""``python -m engine``."""

from engine.command.cli import main

raise SystemExit(main())
