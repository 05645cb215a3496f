"""Command ``engine inspect``: the size of a model's prefixes, and how many fit into a byte
budget."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.config import BUILTIN_DIR
from engine.hub import display_name, resolve_folder
from engine.weights.layer_names import MODEL_OPT_FILE, MODEL_SLIM_FILE
from hybridcache.allocators.arena import slab_rows
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB, format_bytes, format_count
from hybridcache.lab.extras import how_to_install

INTERVALS = (512, 1024, 2048, 4096, 8192, 16384)


def add_flags(inspect: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    inspect.add_argument(
        "model",
        nargs="?",
        help="model directory, config.json, or name of a preset such as qwen3-next; by default the "
        "built-in model",
    )
    inspect.add_argument(
        "--budget-gib",
        type=float,
        nargs="+",
        default=[4.0, 40.0],
        metavar="GIB",
        help="budgets to calculate (default: 4 40)",
    )
    inspect.add_argument(
        "--kv-dtype", choices=("float32", "bfloat16", "fp8"), help="number format of KV"
    )
    inspect.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16", "int8"),
        help="number format of recurrent states",
    )
    inspect.add_argument(
        "--checkpoint-dtype",
        metavar="WORD",
        help="number format of recurrent states in checkpoints: bfloat16, int8, fp8, int8:head ...",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code of the process."""
    if not all(0 < gib < math.inf for gib in arguments.budget_gib):
        raise ValueError("--budget-gib must be finite and above 0.")
    dtypes = {
        name: value
        for name in ("kv_dtype", "state_dtype", "checkpoint_dtype")
        if (value := getattr(arguments, name)) is not None
    }
    model = None if arguments.model is None else resolve_folder(arguments.model)
    geometry = load_geometry(model, **dtypes)
    notes = describe_files(model), describe_refusal(model)
    if arguments.json:
        print(json.dumps(as_record(geometry, arguments.budget_gib, *notes)))
    else:
        print(as_text(geometry, arguments.budget_gib, *notes))
    return 0


@dataclass(frozen=True, slots=True)
class Holding:
    """Contents of a budget if there is one checkpoint for every ``interval`` tokens of cached
    text."""

    interval: int | None
    """Tokens from one checkpoint to the next. None means KV only."""
    num_tokens: int
    num_checkpoints: int
    state_share: float
    """Share of the bytes used by checkpoints."""


def load_geometry(word: str | None, **dtypes: str) -> ModelGeometry:
    """Return the geometry of a model directory, a config.json, a preset, or (None) the built-in
    model.

    Raises ValueError if it cannot be found.
    """
    if word is None:
        word = str(BUILTIN_DIR)
    try:
        geometry = ModelGeometry.load(word, **dtypes)
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no {error.filename}: name a directory with a config.json."
        ) from error
    except ValueError as error:
        if not Path(word).exists():
            raise ValueError(
                f"No model directory, config.json or preset '{word}': {error}."
            ) from error
        why = _unknown_type(word)
        raise ValueError(f"{why.rstrip('.')}; {error}" if why else str(error)) from error
    path = Path(word)
    if path.suffix == ".json" and path.stem != "config":
        return replace(geometry, name=path.stem)
    return replace(geometry, name=display_name(path)) if path.is_dir() else geometry


def describe_files(word: str | None) -> str | None:
    """Return the quantization of the weights of a model directory or config.json, or the reason why
    it is not supported.

    None if the weights are not quantized, or there is no file. Imports torch if they are.
    """
    config = _config_file(word)
    if config is None:
        return None
    directory, raw = config.parent, json.loads(config.read_text(encoding="utf-8"))
    files = (directory / MODEL_SLIM_FILE, directory / MODEL_OPT_FILE)
    if "quantization_config" not in json.dumps(raw) and not any(map(Path.is_file, files)):
        return None
    from engine.weights.model_config import ModelError
    from engine.weights.quantized_formats import read_quantization

    try:
        found = read_quantization(raw, directory)
    except ModelError as error:
        return str(error)
    return None if found is None else f"{found.describe()} ({found.label})"


def describe_refusal(word: str | None) -> str | None:
    """Return the reason why ``engine serve`` refuses a model with a readable geometry. None if it
    supports the model, or if ``word`` names no file."""
    config = _config_file(word)
    if config is None:
        return None
    from engine.weights.model_config import ModelError

    try:
        from engine.models import read_model
    except ModuleNotFoundError as error:
        return f"unknown, {how_to_install(error, 'engine')}"
    try:
        read_model(json.loads(config.read_text(encoding="utf-8")))
    except ModelError as error:
        return str(error)
    return None


def _unknown_type(word: str) -> str | None:
    """Return the reason why the model_type of a config.json is not supported. None if it is
    supported, or not known."""
    config = _config_file(word)
    why = None
    if config is not None:
        with suppress(ValueError, AttributeError):  # No JSON, or no object.
            why = describe_refusal(word)
    return why if why is not None and "model_type" in why else None


def _config_file(word: str | None) -> Path | None:
    """Return the config.json that ``load_geometry`` reads, or None if it reads no file."""
    if word is None:
        return None
    path = Path(word)
    config = path / "config.json" if path.is_dir() else path
    return config if config.suffix == ".json" and config.is_file() else None


def holdings(geometry: ModelGeometry, budget_bytes: int) -> tuple[Holding, ...]:
    """Return the contents of an arena of ``budget_bytes``, for KV only and for each interval."""
    rows = [Holding(None, budget_bytes // geometry.kv_bytes_per_token, 0, 0.0)]
    if geometry.state_bytes:
        row_bytes = geometry.kv_bytes_per_token
        slot_bytes = slab_rows(geometry.state_bytes, row_bytes) * row_bytes
        for interval in INTERVALS:
            unit = interval * row_bytes + slot_bytes
            count = budget_bytes // unit
            rows.append(Holding(interval, count * interval, count, slot_bytes / unit))
    return tuple(rows)


def as_record(
    geometry: ModelGeometry,
    budgets_gib: Sequence[float],
    files: str | None = None,
    refusal: str | None = None,
) -> dict[str, object]:
    """Return all details of ``as_text``, for machines."""
    return {
        **asdict(geometry),
        "files": files,
        "refusal": refusal,
        "state_bytes": geometry.state_bytes,
        "recurrent_bytes": geometry.recurrent_bytes,
        "state_tokens": geometry.state_tokens,
        "budgets": [
            {"gib": gib, "holds": [asdict(row) for row in holdings(geometry, int(gib * GIB))]}
            for gib in budgets_gib
        ],
    }


def as_text(
    geometry: ModelGeometry,
    budgets_gib: Sequence[float],
    files: str | None = None,
    refusal: str | None = None,
) -> str:
    """Return one screen about ``geometry``, with the results of ``describe_files`` and
    ``describe_refusal``."""
    lines = [
        geometry.name,
        f"  mixers       {geometry.num_full_layers} with KV, "
        f"{geometry.num_linear_layers} with a state",
        f"  weights      {format_count(geometry.total_params)}, "
        f"{format_count(geometry.active_params)} active (embeddings not counted)",
        *([] if files is None else [f"  files        {files}"]),
        *([] if refusal is None else [f"  served       no: {refusal}"]),
        f"  KV           {format_bytes(geometry.kv_bytes_per_token)} a token",
    ]
    if geometry.state_bytes:
        lines += [
            f"  checkpoint   {format_bytes(geometry.state_bytes)}: recurrent "
            f"{format_bytes(geometry.recurrent_bytes)} in {geometry.state_dtype}, conv "
            f"{format_bytes(geometry.conv_bytes)}",
            f"  exchange     one checkpoint weighs as much as the KV of "
            f"{geometry.state_tokens:,.0f} tokens",
        ]
    else:
        lines.append(
            "  checkpoint   none needed: no linear layers, any prefix of the KV can be resumed"
        )
    for gib in budgets_gib:
        lines += [
            "",
            f"  {gib:g} GiB, one arena, hold",
            *_table(holdings(geometry, int(gib * GIB))),
        ]
    return "\n".join(lines)


def _table(rows: Sequence[Holding]) -> list[str]:
    table = [
        f"    {'a checkpoint every':>20} {'tokens':>14} {'checkpoints':>12} {'their bytes':>12}"
    ]
    for row in rows:
        every = "never (KV alone)" if row.interval is None else f"{row.interval:,} tokens"
        table.append(
            f"    {every:>20} {row.num_tokens:>14,} {row.num_checkpoints:>12,} "
            f"{row.state_share:>11.0%} "
        )
    return [line.rstrip() for line in table]
