"""Measured launch parameters of this device, if a table for it is in this folder.

Without a table, each launcher uses its defaults. `python -m experiments.gpu --part tune`
measures and writes a table. Cached and recomputed results must be bit-identical, so a choice may
depend only on data that cannot change the bits:

- Most choices depend on the layer's shape and dtypes, never on the batch: ``num_warps`` changes the
  division of a sum among threads, and it must be the same for every batch.
- If the key has ``tokens``, a choice affects only the assignment of outputs to programs and the
  pipelining of loads. Such a kernel sums by ``tl.dot`` alone, over k in one order, and the tuner
  rejects candidates with different bits.
- Parameters that divide a long sum cannot be tuned: BK and spans of products, key tiles and splits
  of attention, the tile of 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("tuned.json")

Config = dict[str, int]
Key = tuple[object, ...]
Table = Mapping[tuple[str, Key], Config]
"""Launch parameters by (kernel, key). They replace the launcher's defaults."""
NOTHING: Config = {}


class Tunable(NamedTuple):
    """Key and candidates of a kernel's parameters."""

    keys: tuple[str, ...]
    """Properties that a choice depends on, in the order of the launcher's arguments."""
    candidates: tuple[Config, ...]


def grid(**choices: tuple[int, ...]) -> tuple[Config, ...]:
    """Return all combinations."""
    return tuple(dict(zip(choices, values, strict=True)) for values in product(*choices.values()))


TUNABLES: Mapping[str, Tunable] = {
    "gdn.solve_kernel": Tunable(
        ("dtype", "K"), grid(HEADS=(1, 2), num_warps=(2, 4), num_stages=(1, 2, 3))
    ),
    "gdn.scan_kernel": Tunable(
        ("dtype", "K", "V"), grid(BV=(16, 32, 64), num_warps=(2, 4), num_stages=(1, 2, 3))
    ),
    "gdn.decode_kernel": Tunable(
        ("state_dtype", "K", "V"), grid(BV=(8, 16, 32, 64), num_warps=(1, 2, 4))
    ),
    "mamba2.weigh_kernel": Tunable(
        ("dtype", "K"), grid(HEADS=(1, 2, 4, 8), num_warps=(2, 4), num_stages=(1, 2, 3))
    ),
    "mamba2.scan_kernel": Tunable(
        ("dtype", "K", "V"), grid(BV=(16, 32, 64), num_warps=(2, 4), num_stages=(1, 2, 3))
    ),
    "mamba2.decode_kernel": Tunable(
        ("state_dtype", "K", "V"), grid(BV=(8, 16, 32, 64), num_warps=(1, 2, 4))
    ),
    "conv1d.prefill_kernel": Tunable(("C", "W"), grid(BC=(32, 64, 128), num_warps=(2, 4, 8))),
    "conv1d.decode_kernel": Tunable(("C", "W"), grid(BC=(64, 128, 256, 512), num_warps=(1, 2, 4))),
    "attention.prefill_attention_kernel": Tunable(
        ("dtype", "D", "G"), grid(num_warps=(4, 8), num_stages=(2, 3, 4, 5))
    ),
    "attention.decode_attention_kernel": Tunable(
        ("dtype", "D", "G"), grid(num_warps=(2, 4, 8), num_stages=(3, 4, 5, 7))
    ),
    "linear.linear_kernel": Tunable(
        ("dtype", "weight_dtype", "M", "N", "tokens"),
        grid(BM=(64, 128), num_warps=(4, 8), num_stages=(3, 4, 5))
        + grid(BM=(128,), BT=(256,), num_warps=(8,), num_stages=(3, 4)),
    ),
    "moe.gate_up_kernel": Tunable(
        ("dtype", "weight_dtype", "M", "N", "tokens"),
        grid(BM=(32, 64, 128), num_warps=(4, 8), num_stages=(3, 4)),
    ),
    "moe.down_kernel": Tunable(
        ("dtype", "weight_dtype", "M", "N", "tokens"),
        grid(BM=(64, 128), num_warps=(4, 8), num_stages=(3, 4, 5)),
    ),
    "norm.rms_norm_kernel": Tunable(("N",), grid(num_warps=(1, 2, 4, 8))),
    "state_copy.copy_kernel": Tunable(
        (), grid(BLOCK_BYTES=(4096, 8192, 16384, 32768), num_warps=(4, 8))
    ),
}
"""Tunable kernels, by folder and name."""


def tuned(kernel: str, *key: object) -> Config:
    """Return the tuned parameters of a kernel at a key. Empty if this device's table has none."""
    return _tables[-1](kernel, key)


def token_class(num_tokens: int) -> int:
    """Round ``num_tokens`` up to a power of two from 16 to 4096, for shared parameters."""
    return min(max(16, 1 << (num_tokens - 1).bit_length()), 4096)


@contextmanager
def using(table: Table) -> Iterator[list[tuple[str, Key]]]:
    """Use ``table`` in place of the device's inside a ``with`` block. Yields the keys looked up."""
    asked: list[tuple[str, Key]] = []

    def look_up(kernel: str, key: Key) -> Config:
        asked.append((kernel, key))
        return table.get((kernel, key), NOTHING)

    _tables.append(look_up)
    try:
        yield asked
    finally:
        _tables.remove(look_up)


def read(path: Path, device: str) -> Table:
    """Read the table of a device by its name. Empty if there is none."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["devices"].get(device, [])
    return {
        (row["kernel"], tuple(_part(part) for part in row["key"])): row["config"] for row in rows
    }


def write(path: Path, device: str, table: Table, about: Mapping[str, object]) -> None:
    """Write ``table`` into the file's entry of ``device``, with ``about`` as its provenance."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"devices": {}}
    merged = {**read(path, device), **table}
    known["devices"][device] = [
        {
            "kernel": kernel,
            "key": [
                str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for x in key
            ],
            "config": dict(config),
        }
        for (kernel, key), config in sorted(merged.items(), key=str)
    ]
    path.write_text(json.dumps({"about": about, **known}, indent=1) + "\n", encoding="utf-8")


def _part(part: str | int) -> object:
    return getattr(torch, part) if isinstance(part, str) else part


@cache
def _of_this_device() -> Table:
    if not PATH.exists() or not torch.accelerator.is_available():
        return {}
    return read(PATH, torch.get_device_module().get_device_name())


def _look_up(kernel: str, key: Key) -> Config:
    return _of_this_device().get((kernel, key), NOTHING)


_tables = [_look_up]
