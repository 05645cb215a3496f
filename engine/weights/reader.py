"""Weights into layers: from safetensors, every tensor accounted for, or seeded for tries without
files."""

from __future__ import annotations

import io
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from engine.layers.parameters import Layer, Parameter
from engine.layers.rank import RankCut
from engine.weights.layer_names import model_name
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

HEAD = "mtp."
"""A multi-token prediction head, which is read where it is asked for."""
SKIPPED = ("model.visual.", "visual.")
"""Parts of a model's files that are known and not served: the visual tower."""
STACKED_EXPERTS = "experts.gate_up_proj", "block_sparse_moe.input_linear.weight"
"""How names end of what all experts of a layer have in one tensor."""
TIED_HEAD = "lm_head.weight"
"""A copy of the embedding where a model ties them: files may have it or not, and lists of modules
name it either way."""
DUMMY_STD = 0.02
CHUNK_BYTES = 2**24
"""What one worker reads of a tensor before another may go on with it."""
LEAST_READ_BYTES = 2**14
"""Rows in another order are read run by run where a run has as many on average."""


class WeightFiles:
    """The safetensors files of one model directory, open until ``close``. Reads headers only, until
    ``fill``."""

    def __init__(
        self,
        model_dir: Path,
        num_workers: int,
        quantization: Quantization | None = None,
        *,
        with_head: bool = False,
    ) -> None:
        """Raises WeightsError where the head is asked for and there is none."""
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
                "draft mtp needs a multi-token head, and the checkpoint has none (no tensor "
                f"{HEAD}*): use draft tree, or none."
            )
        if quantization is not None:
            names = (*self.tensors, *self.skipped, TIED_HEAD)
            quantization.check_ignored(name.rpartition(".")[0] for name in names)

    @property
    def has_stacked_experts(self) -> bool:
        """Whether all experts of a layer come as one tensor, in the model and in its head."""
        return any(name.endswith(STACKED_EXPERTS) for name in self.tensors)

    def ties(self, embedding: str) -> bool:
        """Whether the head has the weights of the tensor ``embedding``, of a model that ties them
        unless its files have others. Files that have the head alone have it for both."""
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
        """Check that every parameter has its tensor and every tensor its parameter. ``sizes``: the
        keys of config.json that shapes follow from. Raises WeightsError naming all that do not
        fit."""
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
                f"the checkpoint's tensors do not fit its config.json: {'; '.join(complaints)}"
                + (f"; sizes there are {sizes}." if sizes else ".")
            )

    def _check_dtypes(self, schemes: Mapping[str, Scheme | None]) -> None:
        """What config.json says is 8-bit is so in the files, and nothing else is."""
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
                f"config.json says that {self._quantization.describe()} are {len(plain)} weights "
                f"which are not ({enumerated(plain)}): name them under "
                f"{self._quantization.ignore_key}."
            )
        if coded:
            raise WeightsError(
                f"quantization_config in config.json does not say how {len(coded)} weights are "
                f"quantised: {enumerated(coded)}."
            )

    def fill(self, layer: Layer) -> None:
        """Read the tensors of one layer, in parallel, and put them where they go. Raises
        WeightsError."""
        jobs = [job for item in layer.parameters() for job in self._jobs(*item)]
        for num_bytes in self._pool.map(lambda job: job(), jobs):
            self._num_bytes += num_bytes

    def _jobs(self, name: str, parameter: Parameter) -> Iterator[Callable[[], int]]:
        """Reads that may run side by side; each gives its bytes. What lies in the file as it is
        wanted is read into its place, a chunk at a time."""
        source, target = self.tensors[name], parameter.target
        runs = parameter.runs() if is_place_for(source, parameter) else []
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
                raise WeightsError(f"{offset.name} is not zero: only symmetric weights are served.")
        parameter.fill(tensor, scale)
        return tensor.nbytes + (0 if scale is None else scale.nbytes)

    def close(self) -> str:
        """End the workers and close the files; a line on what was read."""
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
            line += "; its visual tower is not served"
        return line


def check_numbers(name: str, tensor: torch.Tensor) -> None:
    """Raises WeightsError where one of the tensor's numbers is NaN or infinite. One pass over it,
    as fast as memory is read."""
    if not tensor.numel():
        return
    if tensor.dtype is torch.float8_e4m3fn:  # NaN is 0x7f, or 0xff.
        codes = tensor.view(torch.uint8), tensor.view(torch.int8)
        is_sound = int(codes[0].max()) < 0xFF and int(codes[1].max()) < 0x7F
    elif tensor.dtype.is_floating_point:
        is_sound = all(bound.isfinite() for bound in tensor.aminmax())
    else:
        is_sound = True
    if not is_sound:
        raise WeightsError(
            f"{name} holds NaN or infinite numbers: the file is damaged, or what wrote it failed; "
            "fetch it again."
        )


def check_scale(name: str, stored: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> None:
    """Raises WeightsError where a scale of the weight ``name`` is no positive number. A scale of
    zero is one of weights that are all zero."""
    own = scale_name(name, scheme)
    if scale.dtype not in SCALE_DTYPES:
        dtype = str(scale.dtype).removeprefix("torch.")
        raise WeightsError(f"{own} holds {dtype} numbers: scales are float32, bfloat16 or float16.")
    rows = scheme.row_scales(scale, *stored.shape)
    if not (rows.isfinite() & (rows >= 0)).all():
        raise WeightsError(
            f"{own} holds scales that are NaN, infinite or negative: the file is damaged, or what "
            "wrote it failed; fetch it again."
        )
    for row, block in (rows == 0).nonzero().tolist():
        columns = scheme.block[1] or stored.shape[1]
        if stored[row, block * columns : (block + 1) * columns].float().count_nonzero():
            raise WeightsError(
                f"{own} holds a scale of zero for weights that are not: the file is damaged, or "
                "what wrote it failed; fetch it again."
            )


def _read(source: Tensor, target: torch.Tensor, first: int) -> int:
    """Read into ``target`` and check what came; the bytes read. Raises WeightsError."""
    num_bytes = source.read_into(target, first)
    check_numbers(source.name, target)
    return num_bytes


def _read_rows(source: Tensor, parameter: Parameter) -> int:
    """The rows that a rank has of a tensor that is not wanted as it lies in the file."""
    assert source.torch_dtype is not None
    staged = torch.empty(parameter.target.shape, dtype=source.torch_dtype)
    flat, width = staged.view(-1), parameter.row_size
    for row, source_row, num_rows in parameter.runs():
        _read(source, flat[row * width : (row + num_rows) * width], source_row * width)
    parameter.target.copy_(staged)
    return staged.nbytes


def _read_columns(source: Tensor, cut: RankCut, target: torch.Tensor, rows: range) -> int:
    """The columns that a rank has, of some rows, which are read whole."""
    shape = len(rows), *source.shape[1:]
    found = source.read_part(rows.start * math.prod(shape[1:]), shape)
    check_numbers(source.name, found)
    target[rows.start : rows.stop].copy_(cut.of(found))
    return found.nbytes


def is_place_for(source: Tensor, parameter: Parameter) -> bool:
    """Whether the file's bytes can be read into the target, maybe with rows in another order."""
    target = parameter.target
    return (
        parameter.scheme is None
        and target.dtype is source.torch_dtype
        and target.device.type == "cpu"
        and target.is_contiguous()
        and target.numel() > 0
    )


def _check_whole_blocks(name: str, parameter: Parameter) -> None:
    """Raises WeightsError where a rank would have part of a block of columns."""
    cut, scheme = parameter.cut, parameter.scheme
    columns = None if scheme is None else scheme.block[1]
    if cut is None or cut.dim == 0 or columns is None:
        return
    first, end = int(cut.index[0]), int(cut.index[-1]) + 1
    if first % columns or (end % columns and end != cut.size):
        raise WeightsError(
            f"--tp would cut blocks of {columns} columns, which share a scale: {name} has "
            f"{cut.size} columns, {len(cut)} a rank; use fewer ranks."
        )


def scale_name(name: str, scheme: Scheme) -> str:
    """Of the scales of the weight ``name``."""
    return f"{name.removesuffix('.weight')}.{scheme.scale_name}"


def offset_name(name: str) -> str:
    """Of the zero points of the weight ``name``, which ModelSlim writes where they are all 0."""
    return f"{name.removesuffix('.weight')}.weight_offset"


def scale_shapes(scheme: Scheme, num_rows: int, num_columns: int) -> tuple[tuple[int, ...], ...]:
    """All that the scales of a weight ``[num_rows, num_columns]`` may have; one for a row or for
    all come without the last dimensions too."""
    shape = scheme.scale_shape(num_rows, num_columns)
    if not scheme.has_channel_scales:
        return (shape,)
    return (shape, shape[:1]) if scheme.block[0] is not None else (shape, (1,), ())


class Dummy:
    """Seeded weights for any model: each tensor's are drawn from the seed and its name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, layer: Layer) -> None:
        for name, parameter in layer.parameters():
            self.draw(name, parameter)

    def draw(self, name: str, parameter: Parameter) -> None:
        """Magnitudes as a model has them at its first training step."""
        if parameter.cut is not None:  # The same numbers, however many ranks share them.
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
