"""``python -m hybridcache``: the command line."""

from hybridcache.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
