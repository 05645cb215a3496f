"""Recurrences and short convolutions at the sizes of published models, with float32 states.

Qwen3-Next has 16 key heads, 32 value heads and K = V = 128, Kimi-Linear 32 heads, Nemotron-H 128
heads of 64 in 8 groups and a state of 128, Falcon-H1 24 heads of 64 in one group and a state of
256. States of 64 x 64 in bfloat16, which no supported model has, gave two results on an H200: they
also run without products of warp groups (2 warps), and without asynchronous copies (1 stage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from experiments.gpu.kernel_cases import Case, Rivals, Setup, fla, num_bytes
from kernels.packed import TILE, Exports, Packed, num_tiles
from kernels.recurrence import BLOCK_V
from kernels.tuning import Config, using
from tests.kernels.records import Model, taking

LENGTHS = ((8192,), (1024,) * 8, (64, 1000, 3000, 17, 2048, 500, 1500, 63))
"""Packed prompts: a long one, several of equal length, and several of mixed lengths."""
MODELS = {
    "gdn": Model("gdn", 16, 32, 128, 128),
    "kda": Model("kda", 32, 32, 128, 128),
    "mamba2": Model("mamba2", 8, 128, 128, 64),
    "mamba2 large_state": Model("mamba2", 1, 24, 256, 64),
    "conv1d": Model("conv1d", 1, 1, 8192, 4),
}
TINY = {
    "gdn": Model("gdn", 1, 2, 16, 16),
    "kda": Model("kda", 2, 2, 16, 16),
    "mamba2": Model("mamba2", 1, 2, 16, 16),
    "conv1d": Model("conv1d", 1, 1, 48, 4),
}
SQUARE = Model("mamba2", 2, 4, 64, 64)
FLA_OPTIONS = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
STEPS = 4
"""Tokens of a sequence that are verified at once."""


def plans(is_dry: bool) -> Iterator[tuple[Any, ...]]:
    """Yield prompts with and without exports, gates, decoding and verification."""
    for config in ("", "2 warps", "1 stage"):
        yield square, (70,) if is_dry else (70, 130), config
    for name, model in (TINY if is_dry else MODELS).items():
        for lengths in ((70,), (1, 64, 130)) if is_dry else (*LENGTHS, (1024,)):
            yield prompts, name, lengths
        if model.gate_inputs:
            yield gates, name, 70 if is_dry else 8192
        for num_sequences in (1, 3) if is_dry else (1, 16, 64, 256):
            yield decode, name, num_sequences
        for num_sequences in (2,) if is_dry else (1, 16, 64):
            yield verify, name, num_sequences


class Layer:
    """One recurrence, with the inputs that all its cases have."""

    def __init__(self, setup: Setup, model: Model | str) -> None:
        if isinstance(model, str):
            model = (TINY if setup.is_dry else MODELS)[model]
        self.setup, self.model, self.kernel = setup, model, model.kernel

    def functions(self, work: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return a function of our kernel and of its reference, of the fields of a record."""
        name = work if work == "gates" else f"{work}_{self.kernel}"
        fused, reference = (
            taking(getattr(import_module(f"kernels.{self.kernel}.{kind}"), name))
            for kind in ("fused", "reference")
        )
        return fused, reference

    def tokens(self, count: int) -> list[torch.Tensor]:
        """Return tokens, scaled so that outputs do not depend on the state size of Mamba-2."""
        tokens = [self.setup.randn(count, *shape) for shape in self.model.tokens]
        if self.kernel == "mamba2":
            tokens[1] *= self.model.key**-0.5
        return tokens

    def output(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the tensor that has the shape of the output."""
        return tokens[2] if self.kernel in ("gdn", "kda") else tokens[0]

    def gate_inputs(self, count: int) -> list[torch.Tensor]:
        """Return the inputs of gates, and their parameters."""
        shapes = [(count, *shape) for shape in self.model.gate_inputs]
        inputs = [self.setup.randn(*shape) for shape in shapes]
        shapes = self.model.gate_parameters
        return inputs + [self.setup.randn(*shape, dtype=torch.float32) for shape in shapes]

    def constants(self) -> list[torch.Tensor | None]:
        """Return D of Mamba-2, or weight and absent bias of a convolution."""
        _, _, heads, key, value = self.model
        if self.kernel == "conv1d":
            return [self.setup.randn(key, value), None]
        return [self.setup.randn(heads, dtype=torch.float32)] * (self.kernel == "mamba2")

    def states(self, count: int) -> torch.Tensor:
        dtype = None if self.kernel == "conv1d" else torch.float32
        return self.setup.randn(count, *self.model.state, dtype=dtype)

    @property
    def flops(self) -> int:
        """Half of the operations for a token of a full tile."""
        _, groups, heads, key, value = self.model
        if self.kernel == "conv1d":
            return 0
        if self.kernel == "mamba2":  # C B^T of a group; C S, B^T X and P X of a head
            return TILE * (groups * key + heads * value) + 2 * heads * key * value
        # Q K^T and K K^T; K S, Q S and K^T N; T N and P N
        return heads * (2 * TILE * key + 3 * key * value + 2 * TILE * value)


def prompts(
    setup: Setup,
    name: Model | str,
    lengths: tuple[int, ...],
    state_dtype: torch.dtype = torch.float32,
) -> Case:
    """Return a case of prompts from zero.

    All channels have one decay, so that Gated DeltaNet and Kimi Delta Attention compute the same.
    The rival ``exporting`` also saves two states of the longest prompt.
    """
    layer, count = Layer(setup, name), sum(lengths)
    tokens, is_conv = layer.tokens(count), layer.kernel == "conv1d"
    inputs: list[torch.Tensor | None] = [*tokens]
    decay, factor = torch.rand(2, count, layer.model.heads, device=setup.device)
    if layer.kernel == "kda":
        inputs += [-decay[..., None].repeat(1, 1, layer.model.key), factor]
    elif not is_conv:
        inputs += [-decay, factor]
    inputs += layer.constants()
    states = layer.states(len(lengths) + 2).zero_()
    states = states if is_conv else states.to(state_dtype)
    packed, on_cpu = (Packed.from_lengths(lengths, device) for device in (setup.device, "cpu"))
    where: dict[str, Any] = {
        "slots": setup.int32(range(len(lengths))),
        "resumed": torch.zeros(len(lengths), dtype=torch.bool, device=setup.device),
    }
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    ends = sorted({TILE, lengths[longest] // 2 // TILE * TILE} - {0})
    exports = [(longest, end, len(lengths) + i) for i, end in enumerate(ends)]
    work = "prefill" if is_conv else "chunk"
    ours, reference = layer.functions(work)
    here = {"states": states, "packed": packed, **where}
    run = partial(ours, *inputs, **here)
    rivals: Rivals = {"exporting": partial(run, exports=Exports.plan(packed, exports))}
    if layer.kernel == "gdn":
        given = [x[None] for x in (*inputs[:4], factor.to(setup.dtype))]
        more = {"cu_seqlens": packed.cu_seqlens.long()} | FLA_OPTIONS
        initial = torch.zeros_like(states[:-2])
        path = "ops.gated_delta_rule.chunk_gated_delta_rule"
        rivals |= fla(path, lambda chunk: chunk(*given, initial_state=initial, **more)[0][0])
    elif layer.kernel == "kda":
        gdn, _ = Layer(setup, layer.model._replace(kernel="gdn")).functions(work)
        rivals |= {"gdn": partial(gdn, *tokens, -decay, factor, **here, exports=None)}
    elif is_conv:
        given = {"activation": "silu", "cu_seqlens": packed.cu_seqlens.long()}
        given |= {"output_final_state": True}
        path = "modules.causal_conv1d.causal_conv1d"
        rivals |= fla(path, lambda conv: conv(inputs[0][None], inputs[1], **given)[0][0])
        if len({*lengths}) == 1:
            rivals |= {"torch": partial(_torch_conv1d, *inputs[:2], len(lengths))}
    return Case(
        run=partial(run, exports=None),
        expected=lambda: reference(
            *(None if x is None else x.float().cpu() for x in inputs),
            states=states.float().cpu(),
            packed=on_cpu,
            exports=None,
            **{one: tensor.cpu() for one, tensor in where.items()},
        ),
        num_bytes=num_bytes(inputs, layer.output(tokens)) + states[:-2].nbytes,
        num_flops=2 * sum(map(num_tiles, lengths)) * TILE * layer.flops,
        rivals=rivals,
    )


def square(setup: Setup, lengths: tuple[int, ...], config: str) -> Case:
    """Return a case with our launch parameters, or with one of two others. None is tuned."""
    case = prompts(setup, SQUARE, lengths, torch.bfloat16)
    configs: dict[str, Config] = {"2 warps": {"num_warps": 2}, "1 stage": {"num_stages": 1}}
    keys = ("weigh_kernel", (setup.dtype, 64)), ("scan_kernel", (setup.dtype, 64, 64))
    table = {(f"mamba2.{kernel}", key): configs.get(config, {}) for kernel, key in keys}

    def run() -> torch.Tensor:
        with using(table):
            return case.run()

    return replace(case, run=run, rivals={})


def gates(setup: Setup, name: str, num_tokens: int) -> Case:
    layer = Layer(setup, name)
    inputs = layer.gate_inputs(num_tokens)
    ours, plain = layer.functions("gates")
    rivals: Rivals = {"torch": lambda: plain(*inputs)[0]}
    if layer.kernel == "gdn":
        path = "ops.gated_delta_rule.gate.fused_gdn_gate"
        rivals |= fla(path, lambda gate: gate(inputs[0][None], *inputs[2:])[0])
    count = num_bytes(inputs, *plain(*inputs))
    return Case(lambda: ours(*inputs)[0], rivals["torch"], count, rivals=rivals)


def decode(setup: Setup, name: str, num_sequences: int) -> Case:
    """Return a case of one token of each state's sequence, which changes the states."""
    layer = Layer(setup, name)
    tokens, given = layer.tokens(num_sequences), layer.gate_inputs(num_sequences)
    inputs, states = [*tokens, *given, *layer.constants()], layer.states(num_sequences)
    slots, changed = setup.int32(range(num_sequences)), states.clone()
    ours, plain = (partial(one, *inputs, slots=slots) for one in layer.functions("decode"))
    rivals: Rivals = {"torch": partial(plain, states=states.clone())}
    moved = None
    if layer.kernel == "gdn":
        query, key, value, a, b = (x[:, None] for x in inputs[:5])
        more = dict(zip(("g", "beta", "A_log", "dt_bias"), (a, b, *inputs[5:]), strict=True))
        more |= {"initial_state": states, "use_gate_in_kernel": True} | FLA_OPTIONS
        more |= {"use_beta_sigmoid_in_kernel": True}
        path = "ops.gated_delta_rule.fused_recurrent_gated_delta_rule"
        rivals |= fla(path, lambda decode: decode(query, key, value, **more)[0][:, 0])
        moved = 2 * states.nbytes + _loaded_bytes(tokens, given, num_sequences)
    elif layer.kernel == "conv1d":
        cache = F.pad(states, (1, 0))  # Its windows have W inputs, ours W - 1.
        more = {"weight": inputs[1], "activation": "silu"}
        path = "modules.causal_conv1d.causal_conv1d_update"
        rivals |= fla(path, lambda update: update(inputs[0], cache, **more)[0])
    return Case(
        run=partial(ours, states=changed),
        expected=partial(plain, states=states.clone()),
        num_bytes=2 * states.nbytes + num_bytes(inputs, layer.output(tokens)),
        rivals=rivals,
        moved_bytes=moved,
        reset=lambda: changed.copy_(states),
    )


def _loaded_bytes(
    tokens: list[torch.Tensor], inputs: list[torch.Tensor], num_sequences: int
) -> int:
    """Return the bytes that a decode of Gated DeltaNet loads.

    Keys and queries are loaded for each value head and slice of V, gate inputs for each slice.
    """
    query, key, value = tokens
    a, b, *parameters = inputs
    slices = -(-value.shape[2] // BLOCK_V)
    group, programs = value.shape[1] // key.shape[1], slices * value.shape[1] * num_sequences
    per_token = sum(x.nbytes for x in (a, b)) + len(query) * sum(x.nbytes for x in parameters)
    keys = (query.nbytes + key.nbytes) * group
    return slices * (keys + per_token) + 2 * value.nbytes + 4 * programs


def verify(setup: Setup, name: str, num_sequences: int) -> Case:
    """Return a case of ``STEPS`` tokens per sequence, with a new state after each of them."""
    layer, count = Layer(setup, name), num_sequences * STEPS
    tokens = layer.tokens(count)
    inputs = [*tokens, *layer.gate_inputs(count), *layer.constants()]
    states = layer.states(num_sequences + count)
    where = {
        "states": states,
        "packed": Packed.from_lengths([STEPS] * num_sequences, setup.device),
        "slots": setup.int32(range(num_sequences)),
        "step_slots": setup.int32(range(num_sequences, len(states))),
    }
    ours, plain = (partial(one, *inputs, **where) for one in layer.functions("decode"))
    count = states.nbytes + num_bytes(inputs, layer.output(tokens))
    return Case(ours, plain, count, rivals={"torch": plain})


def _torch_conv1d(x: torch.Tensor, weight: torch.Tensor, num_sequences: int) -> torch.Tensor:
    rows = x.unflatten(0, (num_sequences, -1))
    rows = F.conv1d(rows.mT, weight[:, None], padding=3, groups=len(weight))
    return F.silu(rows[:, :, : len(x) // num_sequences]).mT.flatten(0, 1)
