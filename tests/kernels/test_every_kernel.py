"""Rules for all kernels: few parameters, documented wrappers with the signature of their reference,
and references on the device of their inputs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels.attention.sequences import Sequences
from kernels.library import SOURCES
from kernels.packed import Exports, Packed
from kernels.state_copy.reference import Form

pytest.importorskip("triton")
REFERENCE_ONLY = {"mamba1"}
FOLDERS = sorted(
    module.name
    for module in pkgutil.iter_modules(kernels.__path__)
    if module.ispkg and module.name not in REFERENCE_ONLY
)


NATIVE = sorted(path.parent.name for path in SOURCES.glob("*/native.py"))


@pytest.mark.parametrize(
    "folder, backend_name",
    [(folder, "fused") for folder in FOLDERS] + [(folder, "native") for folder in NATIVE],
)
def test_backends_have_the_signature_of_the_reference(folder: str, backend_name: str) -> None:
    backend = importlib.import_module(f"kernels.{folder}.{backend_name}")
    reference = importlib.import_module(f"kernels.{folder}.reference")
    shared = [
        name
        for name in vars(reference)
        if not name.startswith("_")
        and inspect.isfunction(getattr(reference, name))
        and getattr(reference, name).__module__ == reference.__name__
        and inspect.isfunction(getattr(backend, name, None))
    ]
    assert shared
    if backend_name == "native":  # It has all functions that Triton has.
        fused = importlib.import_module(f"kernels.{folder}.fused")
        wanted = {name for name in vars(fused) if inspect.isfunction(vars(reference).get(name))}
        assert wanted <= {*vars(backend)}
    for name in shared:
        ours, expected = (
            inspect.signature(getattr(module, name)) for module in (backend, reference)
        )
        assert list(ours.parameters) == list(expected.parameters), name
        assert inspect.getdoc(getattr(backend, name)), name


# --- Functions that are avoided -----------------------------------------------------------------

POSITION_DEPENDENT = {"silu", "sigmoid", "softplus", "gelu", "SiLU", "Sigmoid", "Softplus", "GELU"}
"""Functions of torch whose bits depend on an element's position: on a CPU, elements after the last
full vector are computed in another way. ``kernels.activation`` has replacements."""


def position_dependent_calls(source: str) -> list[str]:
    """Return the uses of such functions: of torch by name, and methods without arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [alias.name for alias in node.names if alias.name in POSITION_DEPENDENT]
        is_method = isinstance(node, ast.Call) and not node.args and not node.keywords
        use = node.func if is_method else node
        if isinstance(use, ast.Attribute) and use.attr.removesuffix("_") in POSITION_DEPENDENT:
            of_torch = ast.unparse(use.value).split(".")[0] in ("torch", "F", "nn", "functional")
            found += [ast.unparse(use)] if of_torch or is_method else []
    return found


@pytest.mark.parametrize("package", ["engine", "kernels"])
def test_kernels_and_layers_avoid_position_dependent_functions(package: str) -> None:
    files = (Path(kernels.__path__[0]).parent / package).rglob("*.py")
    uses = {str(file): position_dependent_calls(file.read_text("utf-8")) for file in files}
    assert {file: calls for file, calls in uses.items() if calls} == {}


# --- Devices ------------------------------------------------------------------------------------


def meta_calls() -> dict[str, Callable[[], object]]:
    """Return a call of each function of the references on meta tensors, by folder and name."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def int32(*shape: int) -> torch.Tensor:
        return new(*shape, dtype=torch.int32)

    calls: dict[str, Callable[[], object]] = {}

    def add(folder: str, name: str, *args: Any, **kwargs: Any) -> None:
        function = getattr(importlib.import_module(f"kernels.{folder}.reference"), name)
        key = f"{folder}.{name}"
        calls[key if key not in calls else f"{key} ({len(calls)})"] = partial(
            function, *args, **kwargs
        )

    num_tokens, heads, wide = 70, 2, 16
    packed = Packed.from_lengths([69, 1], "meta")
    few = {"packed": Packed.from_lengths([1, 2], "meta"), "step_slots": int32(3)}
    prompt = {
        "packed": packed,
        "slots": int32(2),
        "resumed": new(2, dtype=torch.bool),
        "exports": Exports.plan(packed, [(0, 64, 2)]),
    }
    slots = {"slots": int32(2)}

    def rows(count: int, *shape: int) -> torch.Tensor:
        return new(count, heads, *shape)

    states, step_states = new(4, heads, wide, wide), new(8, heads, wide, wide)
    for name, shape in (("sigmoid", 32), ("silu", 32), ("silu_and_mul", 32), ("relu_squared", 32)):
        add("activation", name, new(3, shape))
    for name in ("sigmoid_mul", "silu_mul"):
        add("activation", name, new(3, 32), new(3, 32))
    attended = {"table": int32(4, 300), "sequences": Sequences.of([0, 1], [269, 1], "meta")}
    pools = new(512, 1, wide), new(512, 1, wide)
    where = attended | {"packed": packed, "scale": 1.0}
    add("attention", "prefill_attention", rows(num_tokens, wide), *pools, **where)
    add("attention", "decode_attention", rows(2, wide), *pools, **attended, scale=1.0)
    verified = attended | {"sequences": Sequences.of([0, 1], [269, 2], "meta")}
    verified |= {"packed": few["packed"], "scale": 1.0}
    add("attention", "verify_attention", rows(3, wide), *pools, **verified)
    add("mla", "prefill_mla", rows(num_tokens, wide), new(512, wide), **where, rank=8)
    add("mla", "decode_mla", rows(2, wide), new(512, wide), **attended, scale=1.0, rank=8)
    add("mla", "multiply_heads", rows(3, wide), new(heads, wide, 8))
    add("mla", "prepare_heads", new(heads, wide, 8))
    add("cache_write", "write_kv", *(new(3, 1, wide),) * 2, *pools, int32(3))
    add("cache_write", "write_rows", new(3, wide), new(512, wide), int32(3))
    add("cache_write", "gather_rows", new(512, wide), int32(3), new(3, wide))
    add("cache_write", "move_rows", new(512, wide), int32(3), int32(3))
    windows, taps = new(8, wide, 3), (new(wide, 4), None)
    add("conv1d", "prefill_conv1d", new(num_tokens, wide), *taps, states=windows, **prompt)
    add("conv1d", "decode_conv1d", new(2, wide), *taps, states=windows, **slots)
    add("conv1d", "decode_conv1d", new(3, wide), *taps, states=windows, **slots, **few)
    add("conv1d", "check_window", new(3, wide), taps[0], windows)

    gate, by_head = rows(num_tokens), new(heads)
    chunk = (rows(num_tokens, wide),) * 3
    add("gdn", "gates", gate, gate, by_head, by_head)
    add("gdn", "chunk_gdn", *chunk, gate, gate, states=states, **prompt)
    add("kda", "gates", chunk[0], gate, by_head, new(heads, wide))
    add("kda", "chunk_kda", *chunk, chunk[0], gate, states=states, **prompt)
    add("mamba2", "gates", gate, by_head, by_head)
    add("mamba2", "chunk_mamba2", *chunk, gate, gate, by_head, states=states, **prompt)
    for count, places in ((2, slots), (3, slots | few)):
        pool = {"states": states if count == 2 else step_states}
        token, scalar = (rows(count, wide),) * 3, rows(count)
        add("gdn", "decode_gdn", *token, scalar, scalar, by_head, by_head, **pool, **places)
        of_kda = (token[0], scalar, by_head, new(heads, wide))
        add("kda", "decode_kda", *token, *of_kda, **pool, **places)
        of_mamba2 = (scalar, by_head, by_head, by_head)
        add("mamba2", "decode_mamba2", *token, *of_mamba2, **pool, **places)
        x, of_state = new(count, 32), (new(count, wide), new(count, wide))
        of_mamba1 = (x, new(wide, 32), new(32), new(32))
        scanned = {"states": new(8, wide, 32)}
        add("mamba1", "decode_mamba1", x, *of_state, *of_mamba1, **scanned, **places)
    add("mamba1", "time_steps", new(3, 32), new(32))
    x, of_state = new(num_tokens, 32), (new(num_tokens, wide), new(num_tokens, wide))
    scanned = {"states": new(8, wide, 32)}
    add("mamba1", "chunk_mamba1", x, *of_state, x, new(wide, 32), new(32), **scanned, **prompt)
    unit = rows(3, wide)

    weight, quantized = new(32, 256), new(32, 256, dtype=torch.int8)
    x = new(5, 256)
    add("linear", "linear", x, weight, new(32))
    add("linear", "prepare", weight)
    add("linear", "join", [lambda rows: rows])
    add("linear", "quantize", weight, "int8")
    add("linear", "quantize_rows", x)
    add("linear", "linear_fp8", x, quantized.to(torch.float8_e4m3fn), new(32, 2), new(32))
    for scale in (new(32), new(32, 2)):
        add("linear", "linear_8bit", x, quantized, scale, new(32))
        add("linear", "prepare_8bit", quantized, scale, None, torch.float32)
        add("linear", "widened", quantized, scale, torch.bfloat16)
    w13, w2 = new(4, 16, 256), new(4, 256, 8)
    chosen = new(5, 2), int32(5, 2)
    add("moe", "route", new(5, 4), 2, True)
    add("moe", "route_sigmoid", new(5, 4), new(4), 2, True)
    add("moe", "experts", x, *chosen, w13, w2)
    add("moe", "prepare", w13, w2)
    narrow = new(4, 16, 256, dtype=torch.int8), new(4, 16), new(4, 256, 8, dtype=torch.int8)
    add("moe", "experts_8bit", x, *chosen, *narrow, new(4, 256))
    add("moe", "prepare_8bit", *narrow, new(4, 256), torch.float32)
    add("moe", "quantize_experts", w13, "int8")
    products = [(lambda rows: new(len(rows), 16), lambda rows: new(len(rows), 256))] * 4
    reference = importlib.import_module("kernels.activation.reference")
    by = {"products": products, "activate": reference.silu_and_mul}
    add("moe", "sum_of_products", x, *chosen, new(5, 1), **by)
    add("moe", "activation", w13, w2)
    add("moe", "weighted_sum", new(5, 2, 256), chosen[0])
    add("norm", "rms_norm", x, new(256), 1e-6, residual=x)
    add("norm", "gated_rms_norm", unit, new(heads, wide), unit, 1e-6)
    add("norm", "gated_rms_norm", unit, new(wide), unit, 1e-6, gate_first=True)
    turned = {"norms": (new(wide),) * 2, "angles": (new(3, 8),) * 2}
    add("rotary", "rotate_and_write", unit, *(new(3, 1, wide),) * 2, *pools, int32(3), **turned)
    add("rotary", "rotate", unit, unit, new(3, 8), new(3, 8))
    pool, checkpoints = new(2, 6, heads, wide, wide), new(8, 8192, dtype=torch.uint8)
    moved = new(2, dtype=torch.int64), new(2, dtype=torch.int64)
    form = Form(torch.int8, (0, 1, 2), 0, 4096)
    add("state_copy", "copy_states", [pool], int32(2), int32(2))
    add("state_copy", "narrow_states", pool, moved[0], checkpoints, moved[1], form)
    add("state_copy", "widen_states", checkpoints, moved[0], pool, moved[1], form)
    return calls


HELPERS = {"gdn.normalise", "gdn.prepare", "gdn.write_and_read"}
"""Functions that other references call with tensors of their own."""


def public_functions(folder: str) -> set[str]:
    """Return the public functions that a folder's reference defines, as ``folder.name``."""
    module = importlib.import_module(f"kernels.{folder}.reference")
    return {
        f"{folder}.{name}"
        for name, member in vars(module).items()
        if inspect.isfunction(member)
        and member.__module__ == module.__name__
        and not name.startswith("_")
    }


@pytest.fixture
def readable_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let meta tensors be uploaded and read: all elements are zero, and every condition is true."""

    def zeros(shape: torch.Size) -> Any:
        return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0

    def bincount(x: torch.Tensor, minlength: int) -> torch.Tensor:
        return torch.tensor([x.numel(), *[0] * (minlength - 1)])  # only read on the host

    def read_meta(name: str, value: Callable[[torch.Tensor], Any]) -> None:
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x: value(x) if x.is_meta else read(x))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "bincount", bincount)
    read_meta("tolist", lambda x: zeros(x.shape))
    read_meta("__int__", lambda x: 0)
    read_meta("__bool__", lambda x: True)


@pytest.mark.usefixtures("readable_meta")
def test_references_make_every_tensor_on_the_device_of_their_inputs() -> None:
    """A tensor on another device raises, as it would on a GPU."""
    calls = meta_calls()
    for call in calls.values():
        call()
    called = {name.partition(" ")[0] for name in calls}
    folders = [*FOLDERS, *REFERENCE_ONLY]
    assert called == set().union(*map(public_functions, folders)) - HELPERS
