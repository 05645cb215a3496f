"""Command ``python -m hybridcache.vllm.check``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any, cast

from hybridcache.command.field_texts import class_body, documented
from hybridcache.lab.traces import open_trace
from hybridcache.vllm import check

if find_spec("vllm") is None:
    sys.exit("hybridcache.vllm.check needs vLLM in this environment (docs/how-to/vllm.md).")
from hybridcache.vllm.check.engine import SMALL, Options, run
from hybridcache.vllm.check.isolation import PARTS, drop_from_hashes, mixed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check. Returns 1 if a row or state was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridcache.vllm.check", description=check.__doc__
    )
    parser.add_argument(
        "--trace",
        default="chat?head=400",
        help="workload of the laboratory, or mixed: equal tokens with different images, adapters, "
        "salts and embeddings, for a small model with blocks of 128 tokens; or text: the same "
        "without these",
    )
    parser.add_argument(
        "--drop", choices=PARTS, help="part left out of vLLM's hashes, which the check must find"
    )
    for name, kind, text in documented(class_body(Options)):
        reads = {"str": str, "int": int, "float": float}.get(kind, json.loads)
        reader = {"type": reads, "default": getattr(Options, name)}
        flag: dict[str, Any] = {"action": "store_true"} if kind == "bool" else reader
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, help=text, **flag)
    given = vars(parser.parse_args(argv))
    trace, dropped = given.pop("trace"), given.pop("drop")
    options = Options(**given)
    if dropped:
        drop_from_hashes(dropped)
    requests: Iterable[Any]
    if trace in ("mixed", "text"):
        embedded = 0.7 if dropped == "embedding" else 0.15
        requests = mixed(options.seed, embedded=embedded, is_text=trace == "text")
        options = replace(options, **cast(dict[str, Any], SMALL))
    else:
        requests = open_trace(trace)
    report = run(requests, options)
    print(json.dumps(asdict(report) | {"hit_rate": round(report.hit_rate, 4)}))
    return int(report.num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
