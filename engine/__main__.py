"""The command ``engine``, also as ``python -m engine``."""


def main() -> int:
    """Run the command, and return its exit code, also while its modules are imported."""
    try:
        from engine.front.command import cli
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
