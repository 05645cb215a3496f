"""Construction of a model with its weights, read from safetensors files or seeded."""

from __future__ import annotations

import io
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from engine.config import EngineConfig, num_load_workers
from engine.layers.linear import Build, Layer, Parameter, RankCut
from engine.layers.prediction import PredictionHead
from engine.models.decoder import Decoder, Fill
from engine.runner.device import Device
from engine.weights.layer_names import model_name
from engine.weights.model_config import ModelConfig, ModelError
from engine.weights.scheme import SCALE_DTYPES, Quantization, Scheme
from engine.weights.tensor_files import (
    FILE_DTYPES,
    FULL_DTYPES,
    Tensor,
    WeightsError,
    enumerated,
    find_files,
    open_file,
)
from hybridcache.geometry.units import format_count

HEAD = "mtp."
"""Prefix of a multi-token prediction head, which is read only if requested."""
SKIPPED = ("model.visual.", "visual.")
"""Prefixes of known parts that are not supported: the visual tower."""
STACKED_EXPERTS = "experts.gate_up_proj", "block_sparse_moe.input_linear.weight"
"""Endings of the names of tensors that contain all experts of a layer."""
TIED_HEAD = "lm_head.weight"
"""Copy of the embedding if a model ties them. Files may or may not contain it, and lists of modules
may name it in both cases."""
DUMMY_STD = 0.02
CHUNK_BYTES = 2**24
"""Size of the parts of a tensor that workers read in parallel."""
LEAST_READ_BYTES = 2**14
"""Minimum average size of the runs in which reordered rows are read."""


class WeightFiles:
    """The safetensors files of one model directory, open until ``close``. Until ``fill``, only
    headers are read."""

    def __init__(
        self,
        model_dir: Path,
        num_workers: int,
        quantization: Quantization | None = None,
        *,
        with_head: bool = False,
    ) -> None:
        """Open the files. Raises WeightsError if the head is requested and there is none."""
        self._quantization = quantization
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="weights")
        self._started = time.monotonic()
        self._num_bytes = 0
        headers = self._pool.map(open_file, find_files(model_dir))
        self.tensors: dict[str, Tensor] = {}
        self.skipped: list[str] = []
        self._files: dict[Path, io.FileIO] = {}
        for tensor in (tensor for header in headers for tensor in header):
            self._files[tensor.path] = tensor.file
            is_of_head = tensor.name.startswith(HEAD)
            if (is_of_head and not with_head) or tensor.name.startswith(SKIPPED):
                self.skipped.append(tensor.name)
            else:
                self.tensors[model_name(tensor.name)] = tensor
        if with_head and not any(name.startswith(HEAD) for name in self.tensors):
            raise WeightsError(
                "--draft mtp requires a multi-token head, and the checkpoint has none (no tensor "
                f"{HEAD}*): use --draft tree, or none."
            )
        if quantization is not None:
            names = (*self.tensors, *self.skipped, TIED_HEAD)
            quantization.check_ignored(name.rpartition(".")[0] for name in names)

    def ties(self, embedding: str) -> bool:
        """Return True if the head has the weights of the tensor ``embedding``, for a model that
        ties them unless its files have others. A head without an embedding in the files is used for
        both."""
        head, own = self.tensors.get(TIED_HEAD), self.tensors.get(embedding)
        if head is None:
            return True
        if own is None:
            self.tensors[embedding] = self.tensors.pop(TIED_HEAD)
            return True
        if (own.dtype, own.shape) != (head.dtype, head.shape):
            return False
        size, width = math.prod(own.shape), CHUNK_BYTES // 8
        parts = ((first, (min(width, size - first),)) for first in range(0, size, width))
        return all(torch.equal(own.read_part(*part), head.read_part(*part)) for part in parts)

    def check(
        self, parameters: Iterable[tuple[str, Parameter]], *, tied: bool, sizes: str = ""
    ) -> None:
        """Check that every parameter has its tensor and every tensor its parameter.

        ``sizes`` lists the keys of config.json that determine shapes. Raises WeightsError with the
        names of all that do not match.
        """
        wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
        schemes: dict[str, Scheme | None] = {}
        for name, parameter in parameters:
            shape, scheme = parameter.shape, parameter.scheme
            wanted[name], schemes[name] = (shape,), scheme
            if scheme is not None:
                wanted[scale_name(name, scheme)] = scale_shapes(scheme, *shape)
            _check_whole_blocks(name, parameter)
        self._check_dtypes(schemes)
        offsets = {offset_name(name) for name, scheme in schemes.items() if scheme is not None}
        unexpected = sorted(set(self.tensors) - set(wanted) - offsets)
        if tied and TIED_HEAD in unexpected:
            unexpected.remove(TIED_HEAD)
        missing = sorted(set(wanted) - set(self.tensors))
        misshaped = [
            f"{name} is {list(self.tensors[name].shape)} instead of {list(shapes[0])}"
            for name, shapes in sorted(wanted.items())
            if name in self.tensors and self.tensors[name].shape not in shapes
        ]
        complaints = [
            f"{len(names)} {kind}: {enumerated(names)}"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of the wrong shape", misshaped),
            )
            if names
        ]
        if complaints:
            raise WeightsError(
                f"the checkpoint's tensors do not match its config.json: {'; '.join(complaints)}"
                + (f"; its sizes are {sizes}." if sizes else ".")
            )

    def _check_dtypes(self, schemes: Mapping[str, Scheme | None]) -> None:
        """Check that the tensors in 8 bits are those that config.json lists."""
        found = {name: self.tensors[name].dtype for name in schemes if name in self.tensors}
        plain, coded = [], []
        for name, dtype in sorted(found.items()):
            scheme = schemes[name]
            if scheme is not None and dtype != FILE_DTYPES[scheme.format]:
                plain.append(f"{name} is {dtype}")
            elif scheme is None and dtype not in FULL_DTYPES:
                coded.append(f"{name} is {dtype}")
        if plain:
            assert self._quantization is not None
            raise WeightsError(
                f"config.json lists {len(plain)} weights as {self._quantization.describe()}, "
                f"but their type differs ({enumerated(plain)}): list them under "
                f"{self._quantization.ignore_key}."
            )
        if coded:
            raise WeightsError(
                "config.json has no quantization_config for weights of these types: "
                f"{enumerated(coded)}."
            )

    def fill(self, layer: Layer) -> None:
        """Read the tensors of one layer in parallel into their targets. Raises WeightsError."""
        jobs = [job for item in layer.parameters() for job in self._jobs(*item)]
        for num_bytes in self._pool.map(lambda job: job(), jobs):
            self._num_bytes += num_bytes

    def _jobs(self, name: str, parameter: Parameter) -> Iterator[Callable[[], int]]:
        """Yield reads that may run in parallel; each returns its number of bytes. If the format
        matches, the file is read directly into the target, one chunk at a time."""
        source, target = self.tensors[name], parameter.target
        is_place = (  # The bytes can be read into it, possibly with reordered rows.
            parameter.scheme is None
            and target.dtype is source.torch_dtype
            and target.device.type == "cpu"
            and target.is_contiguous()
            and target.numel() > 0
        )
        runs = parameter.runs() if is_place else []
        if not runs or target.nbytes < LEAST_READ_BYTES * len(runs):
            if parameter.cut is None or parameter.scheme is not None:
                yield partial(self._convert, name, parameter)
            elif parameter.cut.dim == 0:
                yield partial(_read_rows, source, parameter)
            else:
                band = max(1, CHUNK_BYTES // (source.num_bytes // len(target)))
                for first in range(0, len(target), band):
                    rows = range(first, min(first + band, len(target)))
                    yield partial(_read_columns, source, parameter.cut, target, rows)
            return
        flat, width = target.view(-1), parameter.row_size
        size = CHUNK_BYTES // target.element_size()
        for row, source_row, num_rows in runs:
            for first in range(0, num_rows * width, size):
                part = slice(row * width + first, row * width + min(first + size, num_rows * width))
                yield partial(_read, source, flat[part], source_row * width + first)

    def _convert(self, name: str, parameter: Parameter) -> int:
        tensor, scale = self.tensors[name].read(), None
        check_numbers(name, tensor)
        if parameter.scheme is not None:
            scale = self.tensors[scale_name(name, parameter.scheme)].read()
            check_scale(name, tensor, scale, parameter.scheme)
            offset = self.tensors.get(offset_name(name))
            if offset is not None and offset.read().count_nonzero():
                raise WeightsError(
                    f"{offset.name} is not zero: only symmetric weights are supported."
                )
        parameter.fill(tensor, scale)
        return tensor.nbytes + (0 if scale is None else scale.nbytes)

    def close(self) -> str:
        """End the workers and close the files. Returns a line on the files that were read."""
        self._pool.shutdown()
        for file in self._files.values():
            file.close()
        self.tensors.clear()
        seconds = time.monotonic() - self._started
        line = f"{self._num_bytes / 2**20:,.0f} MiB of weights in {seconds:.1f} s"
        heads = [name for name in self.skipped if model_name(name).startswith(HEAD)]
        if heads:
            line += "; its multi-token head is read with --draft mtp only"
        if len(self.skipped) > len(heads):
            line += "; its visual tower is not supported"
        return line


def check_numbers(name: str, tensor: torch.Tensor) -> None:
    """Raise WeightsError if a number of the tensor is NaN or infinite. One pass at memory speed."""
    if not tensor.numel():
        return
    if tensor.dtype is torch.float8_e4m3fn:  # NaN is 0x7f or 0xff.
        codes = tensor.view(torch.uint8), tensor.view(torch.int8)
        is_sound = int(codes[0].max()) < 0xFF and int(codes[1].max()) < 0x7F
    elif tensor.dtype.is_floating_point:
        is_sound = all(bound.isfinite() for bound in tensor.aminmax())
    else:
        is_sound = True
    if not is_sound:
        raise WeightsError(
            f"{name} contains NaN or infinite numbers: the file is damaged, or its writer failed; "
            "download it again."
        )


def check_scale(name: str, stored: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> None:
    """Raise WeightsError if a scale of the weight ``name`` is not a positive number. A scale of
    zero is allowed if all its weights are zero."""
    own = scale_name(name, scheme)
    if scale.dtype not in SCALE_DTYPES:
        dtype = str(scale.dtype).removeprefix("torch.")
        raise WeightsError(f"{own} has type {dtype}: scales must be float32, bfloat16 or float16.")
    rows = scheme.row_scales(scale, *stored.shape)
    if not (rows.isfinite() & (rows >= 0)).all():
        raise WeightsError(
            f"{own} contains scales that are NaN, infinite or negative: the file is damaged, or "
            "its writer failed; download it again."
        )
    for row, block in (rows == 0).nonzero().tolist():
        columns = scheme.block[1] or stored.shape[1]
        if stored[row, block * columns : (block + 1) * columns].float().count_nonzero():
            raise WeightsError(
                f"{own} contains a scale of zero for weights that are not zero: the file is "
                "damaged, or its writer failed; download it again."
            )


def _read(source: Tensor, target: torch.Tensor, first: int) -> int:
    """Read into ``target`` and check the numbers. Returns the bytes read. Raises WeightsError."""
    num_bytes = source.read_into(target, first)
    check_numbers(source.name, target)
    return num_bytes


def _read_rows(source: Tensor, parameter: Parameter) -> int:
    """Read a rank's rows of a tensor that cannot be read directly into the target."""
    assert source.torch_dtype is not None
    staged = torch.empty(parameter.target.shape, dtype=source.torch_dtype)
    flat, width = staged.view(-1), parameter.row_size
    for row, source_row, num_rows in parameter.runs():
        _read(source, flat[row * width : (row + num_rows) * width], source_row * width)
    parameter.target.copy_(staged)
    return staged.nbytes


def _read_columns(source: Tensor, cut: RankCut, target: torch.Tensor, rows: range) -> int:
    """Read some rows completely and copy the columns of a rank."""
    shape = len(rows), *source.shape[1:]
    found = source.read_part(rows.start * math.prod(shape[1:]), shape)
    check_numbers(source.name, found)
    target[rows.start : rows.stop].copy_(cut.of(found))
    return found.nbytes


def _check_whole_blocks(name: str, parameter: Parameter) -> None:
    """Raise WeightsError if a rank would have part of a block of columns."""
    cut, scheme = parameter.cut, parameter.scheme
    columns = None if scheme is None else scheme.block[1]
    if cut is None or cut.dim == 0 or columns is None:
        return
    first, end = int(cut.index[0]), int(cut.index[-1]) + 1
    if first % columns or (end % columns and end != cut.size):
        raise WeightsError(
            f"--tp would split blocks of {columns} columns that share a scale: {name} has "
            f"{cut.size} columns, {len(cut)} per rank; use fewer ranks."
        )


def scale_name(name: str, scheme: Scheme) -> str:
    """Return the name of the scales of the weight ``name``."""
    return f"{name.removesuffix('.weight')}.{scheme.scale_name}"


def offset_name(name: str) -> str:
    """Return the name of the zero points of the weight ``name``, which ModelSlim also writes if all
    are 0."""
    return f"{name.removesuffix('.weight')}.weight_offset"


def scale_shapes(scheme: Scheme, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], ...]:
    """Return the allowed shapes of the scales of a weight ``[num_rows, num_columns]``. One scale
    per row or for all may also lack the last dimensions."""
    shape = scheme.scale_shape(num_rows, num_columns)
    if not scheme.has_channel_scales:
        return (shape,)
    return (shape, shape[:1]) if scheme.block[0] is not None else (shape, (1,), ())


class Dummy:
    """Seeded weights for any model. Each tensor depends only on the seed and its name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, layer: Layer) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)

    def draw(self, name: str, parameter: Parameter) -> None:
        """Fill a parameter with magnitudes as at a model's first training step."""
        if parameter.cut is not None:  # The numbers must not depend on the number of ranks.
            whole = parameter.target.new_empty(parameter.shape)
            self.draw(name, Parameter(whole, parameter.role))
            parameter.target.copy_(parameter.cut.of(whole))
            return
        target = parameter.target
        generator = torch.Generator(target.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if parameter.role in ("norm", "time_bias", "skip"):
            target.fill_(1.0)
        elif parameter.role == "centred_norm":
            target.zero_()
        elif parameter.role == "log_decay":
            target.uniform_(math.log(0.01), math.log(16.0), generator=generator)
        else:
            target.normal_(0.0, DUMMY_STD, generator=generator)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OTHER_DTYPES = ("float16", "float64")
"""Number formats of files that are converted to the default one of the device."""


def load_model(
    settings: EngineConfig, family: type[Decoder], config: ModelConfig, build: Build
) -> tuple[Decoder, PredictionHead | None, str]:
    """Build the model that ``settings`` name, with its weights, and with its multi-token head if
    it is used.

    Returns both, and a description of the number and the source of the weights. Raises
    WeightsError before any tensor is read if the weight files do not match the config or have no
    head. Raises ModelError if the family's head is not supported.
    """
    outline = replace(build, weights=replace(build.weights, device=torch.device("meta")))
    with_head = settings.drafts.head_len > 0
    if settings.load_format == "dummy":
        counted = _counted(family(config, outline), with_head)
        dummy = Dummy(settings.seed)
        model = family(config, build, dummy.fill)
        head = _head(model, dummy.fill) if with_head else None
        return model, head, f"{counted}; seeded (seed {settings.seed}), untrained"
    files = WeightFiles(
        settings.model_dir, num_load_workers(), build.weights.files, with_head=with_head
    )
    files.tensors = family.published(files.tensors)
    if config.tie_embeddings:
        config = replace(config, tie_embeddings=files.ties(f"{family.embedding_name}.weight"))
    is_stacked = any(name.endswith(STACKED_EXPERTS) for name in files.tensors)
    plan = family(config, outline, stacked_experts=is_stacked)
    parameters = plan.parameters()
    if with_head:
        parameters = chain(parameters, _head(plan).parameters())
    files.check(parameters, tied=config.tie_embeddings, sizes=config.described_sizes)
    model = family(config, build, files.fill, stacked_experts=is_stacked)
    head = _head(model, files.fill) if with_head else None
    note = files.close() + build.weights.note()
    if config.unknown_keys:
        note += f"; ignored keys of config.json: {enumerated(sorted(config.unknown_keys))}"
    return model, head, f"{_counted(plan, with_head)}; {note}"


def _counted(plan: Decoder, with_head: bool) -> str:
    """Describe the number of weights in all tensors, including embeddings and the parts of all
    ranks."""
    parts: list[Decoder | PredictionHead] = [plan, _head(plan)] if with_head else [plan]
    numbers = [
        format_count(sum(math.prod(parameter.shape) for _, parameter in part.parameters()))
        for part in parts
    ]
    return f"{numbers[0]} parameters" + "".join(
        f" and {number} of its multi-token head" for number in numbers[1:]
    )


def _head(model: Decoder, fill: Fill | None = None) -> PredictionHead:
    """Make the head of ``model``, with weights if ``fill`` is given."""
    head = model.prediction_head()
    if head is None:
        raise ModelError(
            f"--draft mtp requires a multi-token head, which is not supported for "
            f"{type(model).__name__}: use --draft tree, or none."
        )
    if fill is not None:
        fill(head)
        head.seal()
    return head


def resolve_dtype(word: str, config: ModelConfig, device: Device) -> torch.dtype:
    """Return a dtype by name. ``auto`` is that of the weight files if the device supports it.
    Raises ModelError."""
    name = config.dtype if word == "auto" else word
    if name not in DTYPES:
        if word == "auto" and name in OTHER_DTYPES:
            return device.traits.default_dtype
        raise ModelError(f"dtype {name!r} is not supported: use --dtype float32 or bfloat16.")
    return DTYPES[name]
