"""What the Python environment must not hold."""

from __future__ import annotations

from importlib import metadata

from engine.config import ConfigError


def check_no_foreign_kernels() -> None:
    """ConfigError where Hugging Face's ``kernels`` distribution is installed: its package has the
    name of ours, and which of the two an import finds depends on the order of the path."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"The distribution 'kernels' {version} is installed beside this project, whose own package "
        "has that name: "
        "run `pip uninstall kernels`, or install this project into an environment of its own."
    )
