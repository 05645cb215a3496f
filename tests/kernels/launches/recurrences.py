"""Launches of recurrences at the sizes of published models, in an arena's slots of 36 layers."""

import math
from functools import partial
from importlib import import_module

import torch

from tests.kernels.arena import QWEN3_NEXT, make_arena, prompts, verified
from tests.kernels.records import Model, taking

MODELS = {
    "gdn": Model("gdn", 16, 32, 128, 128),  # Qwen3-Next
    "kda": Model("kda", 32, 32, 128, 128),  # Kimi Linear
    "mamba2": Model("mamba2", 8, 128, 128, 64),  # Nemotron-H
    "mamba2 large_state": Model("mamba2", 1, 128, 256, 64),  # Falcon-H1
}


def recurrence(
    model: Model,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    tile_size: int = 64,
) -> None:
    """Launch a prefill and, in tiles of 64, a decode step and a verification."""
    module = import_module(f"kernels.{model.kernel}.fused")
    works = (getattr(module, f"{work}_{model.kernel}") for work in ("chunk", "decode"))
    chunk, decode = map(taking, works)
    D = [torch.empty(model.heads)] * (model.kernel == "mamba2")
    parameters = [*map(torch.empty, model.gate_parameters)]

    def states(count: int) -> torch.Tensor:
        sizes = QWEN3_NEXT._replace(recurrent=(36, *model.state))
        return make_arena(count, torch.bfloat16, state_dtype, sizes=sizes, fill=None).recurrent[5]

    gates = module.gates(*_gate_inputs(model, 160, dtype), *parameters)
    chunk(*_tokens(model, 160, dtype), *gates, *D, states=states(4), **prompts(tile_size))
    if tile_size == 64:
        step = (*_tokens(model, 4, dtype), *_gate_inputs(model, 4, dtype), *parameters, *D)
        decode(*step, states=states(4), slots=torch.arange(4, dtype=torch.int32))
        decode(*step, states=states(6), **verified())


def _tokens(model: Model, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return slices of one wider tensor, as in a model."""
    widths = [math.prod(shape) for shape in model.tokens]
    parts = torch.empty(count, sum(widths), dtype=dtype).split(widths, dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, model.tokens, strict=True)]


def _gate_inputs(model: Model, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    a, b = torch.empty(count, 2 * model.heads, dtype=dtype).chunk(2, dim=1)
    if model.kernel == "kda":
        a = torch.empty(count, model.heads, model.key, dtype=dtype)
    return [a, b][: len(model.gate_inputs)]


def _launches():
    for name, model in MODELS.items():
        yield name, partial(recurrence, model)
        if model.key == 128:
            for size in (16, 32):
                yield f"{name} tiles_of_{size}", partial(recurrence, model, tile_size=size)
    for name in ("gdn", "mamba2"):
        launch = partial(recurrence, MODELS[name], state_dtype=torch.bfloat16)
        yield f"{name} bfloat16_states", launch


LAUNCHES = dict(_launches())
