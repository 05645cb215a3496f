"""What a model's makers recommend for sampling."""

from __future__ import annotations

import json
from pathlib import Path

from engine.requests.sampling_params import SamplingParams

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling_defaults(model_dir: Path) -> dict[str, float]:
    """Fields of ``SamplingParams`` that ``generation_config.json`` names; none without the file.

    ValueError: a value that could not be served, in one sentence. Its ``do_sample`` is not asked,
    as in vLLM: whoever wants no draw says temperature 0.
    """
    path = model_dir / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {name: named[name] for name in NAMES if named.get(name) is not None}
    if found.get("top_k") == 0:
        del found["top_k"]  # as it says "all"
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Mend it, or use --sampling-defaults none.") from None
    return found
