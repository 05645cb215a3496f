"""Verification of drafts by a mixer without support for it: as a series of decodes, each from a
copy of the previous state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.inputs import DecodePart, LayerInputs, PrefillPart, VerifyPart
from engine.layers.residual import Mixer, verifies
from engine.runner.memory import Pools
from hybridcache.geometry.sizes import StateSpec
from kernels.attention.sequences import Sequences
from kernels.packed import running_sum
from kernels.upload import upload

ROWS = 4
"""Number of rows to which the tokens of a decode are padded."""


def mix(mixer: Mixer, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
    """Call ``mixer.mix``, or decode token by token if the mixer does not support drafts."""
    part = inputs.verify
    if part is None or verifies(mixer):
        return mixer.mix(projected, inputs, pools)
    first, end, outs = inputs.num_decode, inputs.num_decode + inputs.num_verify, []
    if inputs.decode is not None:
        alone = _inputs(inputs, range(first), decode=inputs.decode)
        outs.append(mixer.mix(projected[:first], alone, pools))
    outs.append(_one_by_one(mixer, projected, inputs, part, pools))
    if inputs.prefill is not None:
        rows = range(end, inputs.num_tokens)
        alone = _inputs(inputs, rows, prefill=inputs.prefill)
        outs.append(mixer.mix(projected[end : inputs.num_tokens], alone, pools))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _one_by_one(
    mixer: Mixer, projected: torch.Tensor, inputs: LayerInputs, part: VerifyPart, pools: Pools
) -> torch.Tensor:
    lengths, starts = part.packed.lengths, running_sum(part.packed.lengths)
    states = [
        pool for pool, spec in zip(pools, mixer.keeps, strict=True) if isinstance(spec, StateSpec)
    ]
    outs: list[torch.Tensor] = []
    order: list[int] = []
    for step in range(max(lengths)):
        active = [b for b, length in enumerate(lengths) if length > step]
        rows = [starts[b] + step for b in active]
        index = upload(rows, torch.int64, projected.device)
        slots = part.slots
        if states:
            slots = part.step_slots[index]
            before = part.step_slots[index - 1] if step else part.slots[active]
            for pool in states:
                pool[slots.long()] = pool[before.long()]
        sequences = Sequences.of(
            [part.sequences.rows[b] for b in active],
            [part.sequences.kv_lens[b] - lengths[b] + step + 1 for b in active],
            projected.device,
        )
        own = [inputs.num_decode + row for row in rows]
        alone = _inputs(inputs, own, decode=DecodePart(sequences, slots))
        outs.append(mixer.mix(projected[index + inputs.num_decode], alone, pools))
        order += rows
    mixed = torch.cat(outs)
    out = torch.empty_like(mixed)
    out[upload(order, torch.int64, projected.device)] = mixed
    return out


def _inputs(
    inputs: LayerInputs,
    rows: Sequence[int],
    *,
    decode: DecodePart | None = None,
    prefill: PrefillPart | None = None,
) -> LayerInputs:
    """Return the inputs of some of the tokens."""
    index = upload(list(rows), torch.int64, inputs.kv_indices.device)
    return LayerInputs(
        num_tokens=len(rows),
        num_decode=0 if decode is None else len(rows),
        num_rows=-(-len(rows) // ROWS) * ROWS,
        cos=inputs.cos[index],
        sin=inputs.sin[index],
        kv_indices=inputs.kv_indices[index],
        table=inputs.table,
        decode=decode,
        prefill=prefill,
    )
