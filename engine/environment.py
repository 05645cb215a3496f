"""Check of the Python environment for a conflicting distribution."""

from __future__ import annotations

from importlib import metadata

from engine.config import ConfigError


def check_no_foreign_kernels() -> None:
    """Raise ConfigError if Hugging Face's ``kernels`` distribution is installed.

    Its package has the same name as ours, so the order of ``sys.path`` would decide which of the
    two is imported.
    """
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"The distribution 'kernels' {version} is installed in the same environment as this "
        "project, which has a package of the same name: run  `pip uninstall kernels`, or install "
        "this project into a separate "
        "environment."
    )
