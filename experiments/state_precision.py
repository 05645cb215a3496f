"""What do 16-bit states cost in a model's logits, and what do they spare? Seeded weights: shows the
size of rounding, not of answers that go wrong.

    python -m experiments.state_precision [--model DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests.sampling_params import SamplingParams
from experiments.provenance import RESULTS, write_json_lines


def logprobs(model: str | None, dtype: str, state_dtype: str, length: int) -> tuple[Any, int]:
    """Log-probabilities of one prompt's tokens, prefilled, and the bytes of one state."""
    config = EngineConfig(
        model=model, device="cpu", dtype=dtype, state_dtype=state_dtype, cache_gib=0.5
    )
    engine = Engine(config)
    prompt = np.random.default_rng(0).integers(0, 256, length)
    [output] = engine.generate([prompt], SamplingParams(max_tokens=0), prompt_logprobs=0)
    scores = [token.logprob for token in output.prompt_logprobs[1:]]
    return np.array(scores), engine.runner.geometry.state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model directory; default: the built-in model")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, default=RESULTS / "state_precision.jsonl")
    options = parser.parse_args()
    records = []
    exact, whole = logprobs(options.model, "float32", "float32", options.length)
    for dtype, state_dtype in (
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
    ):
        found, num_bytes = logprobs(options.model, dtype, state_dtype, options.length)
        error = np.abs(found - exact)
        records.append(
            {
                "dtype": dtype,
                "state_dtype": state_dtype,
                "state_bytes": num_bytes,
                "state_bytes_share": num_bytes / whole,
                "logprob_error_mean": float(error.mean()),
                "logprob_error_max": float(error.max()),
            }
        )
        print(records[-1])
    write_json_lines(options.out, records)


if __name__ == "__main__":
    main()
