"""Products with the weights of files: dense layers, experts, the embedding and the head.

They multiply any format, in the order of the file's columns, and add up the parts of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from engine.weights.parameters import Build, Composite, Parameter, Storage, plain_or
from engine.weights.ranks import Cut, Kinds
from hybridcache.geometry.sizes import ExpertsSizes
from hybridcache.geometry.sizes import part as part_of
from kernels.linear.formats import Matrix, Plain, Product
from kernels.linear.formats import QuantizedRows as QuantizedRows
from kernels.linear.reference import SCALE_BLOCK as SCALE_BLOCK
from kernels.recording import repeated


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of the weight files, out of those with the same input."""

    name: str
    """Full name without ``.weight``."""
    num_rows: int
    """Number of rows in the files."""
    rows: torch.Tensor | None = None
    """int64: rows in the files, in the order in which they are used, or None for all in their
    order."""

    @property
    def num_outputs(self) -> int:
        """Number of rows that are used."""
        return self.num_rows if self.rows is None else len(self.rows)

    @property
    def cut(self) -> Cut | None:
        return None if self.rows is None else Cut(self.num_rows, self.rows)


class Linear:
    """``x @ weight.T + bias``. Each row of the result is independent of the number of rows.

    The outputs of all parts are next to each other. The name of a part determines its storage
    format; adjacent parts of the same format are one product.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        build: Build,
        *,
        outputs: Kinds = (),
        sums: bool = False,
        bias: bool = False,
        weight: Matrix | None = None,
    ) -> None:
        """Make the product.

        ``outputs`` are the kinds of units of which the outputs of all parts together consist, if
        they are divided. With ``sums``, the inputs are divided, and the outputs are those of the
        whole model. ``weight`` is an existing weight for all parts.
        """
        cuts = build.rank.cuts([part.num_rows for part in parts], outputs)
        own = [
            part
            if cut is None
            else replace(part, rows=cut.index if part.rows is None else part.rows[cut.index])
            for part, cut in zip(parts, cuts, strict=True)
        ]
        inputs = build.rank.cut((in_features, 1), dim=1) if sums else None
        groups = groupby(own, key=lambda part: build.weights.storage(part.name))
        self._stacks = [
            _Stack(in_features, list(group), storage, build, inputs, bias=bias, weight=weight)
            for storage, group in groups
        ]
        self._kernel = build.kernels["linear"]
        self._sum = build.rank.sum if sums and build.is_divided else None
        """Sum of the results of all ranks, or None if a result is whole."""
        self._in_features = in_features if inputs is None else len(inputs)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for stack in self._stacks:
            yield from stack.parameters()

    def seal(self) -> None:
        products = [stack.product(self._kernel) for stack in self._stacks]
        self._product: Callable[[Any], torch.Tensor] = self._kernel.join(products)
        self._stacks.clear()

    @property
    def takes_fp8_rows(self) -> bool:
        """True if the kernel before this product can quantise its inputs. Only after ``seal``."""
        takes = getattr(self._product, "takes_fp8_rows", None)
        return takes is not None and bool(takes(self._in_features))

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        if isinstance(x, QuantizedRows) and not self.takes_fp8_rows:
            x = x.x
        out = self._product(x)
        return out if self._sum is None else self._sum(out)


class _Stack:
    """Adjacent parts with the same storage format, stacked in one weight."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        storage: Storage,
        build: Build,
        inputs: Cut | None,
        *,
        bias: bool,
        weight: Matrix | None,
    ) -> None:
        self._parts, self._storage, weights = parts, storage, build.weights
        self._weights, self._inputs = weights, inputs
        self._adds_bias = inputs is None or build.rank.number == 0
        self._order = self._input_order(in_features)
        num_rows = sum(part.num_outputs for part in parts)
        if weight is not None:
            self._matrix, self._storage = weight, Storage(weight.format, weight.format)
        else:
            columns = in_features if self._inputs is None else len(self._inputs)
            self._matrix = Matrix.empty(storage.loaded, (num_rows, columns), weights.empty)
        self._bias = weights.empty(num_rows) if bias else None

    def _input_order(self, in_features: int) -> torch.Tensor | None:
        """Return the input of each stored column, or None if they are in order. Columns are stored
        in the order of the file, so that no block of them is taken apart."""
        files = self._weights.files
        places = None if files is None else files.column_order(self._parts[0].name)
        if places is None:
            return None
        inputs = self._inputs
        stored, order = (places if inputs is None else places[inputs.index]).sort()
        self._inputs = None if inputs is None else Cut(in_features, stored, inputs.dim)
        return order.to(self._weights.device)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        sizes = [part.num_outputs for part in self._parts]
        for part, matrix in zip(self._parts, self._matrix.split(sizes), strict=True):
            cut = part.cut or self._inputs
            yield f"{part.name}.weight", Parameter(plain_or(matrix), cut=cut)
        if self._bias is not None:
            for part, bias in zip(self._parts, self._bias.split(sizes), strict=True):
                yield f"{part.name}.bias", Parameter(bias, cut=part.cut)

    def product(self, kernel: ModuleType) -> Product:
        if self._bias is not None and not self._adds_bias:
            self._bias.zero_()  # The bias of one rank is in the sum.
        matrix, format = self._matrix, self._storage.computed
        if format != matrix.format:
            matrix = matrix.quantized(format)
        options = self._weights.product_options(format)
        product = format.product(kernel, matrix, self._bias, self._weights.dtype, **options)
        order = self._order
        return product if order is None else lambda x: product(x.index_select(1, order))


def expert_names(stem: str, *words: str) -> tuple[str, ...]:
    """Return the names of the weights ``words`` of the module ``stem``."""
    return tuple(f"{stem}.{word}.weight" for word in words)


class Experts:
    """All experts of a layer: SwiGLU, or squared ReLU if ``sizes.matrices`` is 2. The first
    matrices of all experts have the same storage format, and so have the last ones, because they
    are multiplied together."""

    def __init__(
        self,
        name: str,
        width: int,
        sizes: ExpertsSizes,
        names: Sequence[str],
        build: Build,
        *,
        shared: Sequence[str] | None = None,
    ) -> None:
        """``name``: common name, which selects the precision. ``width``: size of their input.
        ``names``: those of the tensors in the weight files, of gate and up, or of both in one, or
        of up alone without gates, and last that of down. A name with ``{}`` is that of one expert,
        by number; a name without belongs to all. ``shared``: names of a shared expert, which
        becomes the last one if ``has_shared`` says so."""
        self._names, self._weights, self._rank = names, build.weights, build.rank
        own = part_of(sizes.intermediate, build.rank.count, "units")
        self._count, inner = sizes.num_experts, (sizes.matrices - 1) * own
        self._kinds = [(sizes.intermediate, 1)] * (sizes.matrices - 1)
        self._moe = build.kernels["moe"]
        self._storages = self._stored_as(name, names)
        self.defers = False
        """True to leave the sum of a token's experts to the next norm, if the kernels can."""
        self._shared = None
        if shared is not None and sizes.shared_intermediate == sizes.intermediate:
            is_joined = self._moe.JOINS_SHARED and self._stored_as("", shared) == self._storages
            self._shared = shared if is_joined else None
        count = self._count + self.has_shared
        shapes = (count, inner, width), (count, width, own)
        self._up, self._down = (
            Matrix.empty(storage.loaded, shape, build.weights.empty)
            for storage, shape in zip(self._storages, shapes, strict=True)
        )

    @property
    def has_shared(self) -> bool:
        """True if the shared expert is computed here: it has the size and the format of the others,
        and the kernels are faster with all of them together."""
        return self._shared is not None

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._parameters_of(self._names, range(self._count))
        if self._shared is not None:
            yield from self._parameters_of(self._shared, range(self._count, self._count + 1))

    def _parameters_of(
        self, names: Sequence[str], experts: range
    ) -> Iterator[tuple[str, Parameter]]:
        num_inputs = len(names) - 1
        size = self._up.shape[1] // num_inputs
        matrices = *self._up.split([size] * num_inputs), self._down
        for name, matrix in zip(names, matrices, strict=True):
            is_stack = len(experts) > 1 and "{}" not in name
            kinds, dim = self._kinds[: len(self._kinds) // num_inputs], int(is_stack)
            if name == names[-1]:
                kinds, dim = self._kinds[:1], dim + 1
            cut = self._rank.cut(*kinds, dim=dim)
            if is_stack:
                yield name, Parameter(plain_or(matrix[: len(experts)]), cut=cut)
                continue
            for expert in experts:
                yield name.format(expert), Parameter(plain_or(matrix[expert]), cut=cut)

    def _stored_as(self, name: str, names: Sequence[str]) -> tuple[Storage, Storage]:
        """Return the storage of the first and of the last matrices: that in the files if it is the
        same for all experts, else the one that is asked for the module ``name``."""
        weights, asked = self._weights, self._weights.storage(name)
        if names is self._names and (weights.files is None or "{}" not in names[0]):
            asked = replace(weights, files=None).storage(name)  # Stacks are in full precision.
            return asked, asked
        stored = []
        for group in (names[:-1], names[-1:]):
            found = {
                weights.storage(own.format(expert).removesuffix(".weight"))
                for expert in range(self._count if "{}" in group[0] else 1)
                for own in group
            }
            stored.append(found.pop() if len(found) == 1 else asked)
        first, last = stored
        are_alike = (first.computed == asked.computed) == (last.computed == asked.computed)
        return (first, last) if are_alike else (asked, asked)

    def seal(self) -> None:
        up, down = (
            matrix if storage.computed == matrix.format else matrix.quantized(storage.computed)
            for matrix, storage in zip((self._up, self._down), self._storages, strict=True)
        )
        options = self._weights.product_options(up.format)
        self._product = up.format.experts(self._moe, up, down, self._weights.dtype, **options)
        is_fused = hasattr(self._moe, "prepare_matrices")
        self._takes_fp8_rows = is_fused and bool(options) and up.num_columns % SCALE_BLOCK == 0
        del self._up, self._down

    @property
    def takes_fp8_rows(self) -> bool:
        """As that of ``Linear``."""
        return self._takes_fp8_rows

    @property
    def routing(self) -> Any:
        """Owner of ``route`` and ``route_sigmoid`` for these experts."""
        return self._product if hasattr(self._product, "route") else self._moe

    def __call__(
        self,
        x: torch.Tensor | QuantizedRows,
        weights: torch.Tensor,
        experts: object,
        shared_gate: torch.Tensor | None = None,
    ) -> Any:
        """Compute the built part's summand of the output ``[T, width]`` from ``x`` of the same
        shape, and ``weights`` and ``experts`` of ``routing``. The shared expert is included if its
        gate ``[T, 1]`` is given. If it ``defers``, the result may be ``ExpertSums``."""
        compute = getattr(self._product, "sums", self._product) if self.defers else self._product
        return compute(x, weights, experts, shared_gate=shared_gate)


class Embedding(Composite):
    """Maps token ids to hidden states, ``[T]`` to ``[T, hidden_size]``. Each rank has some of the
    rows."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, build: Build, factor: float = 1.0
    ) -> None:
        """``factor``: multiplier of the hidden states."""
        weights, self._rank, self._kernel = build.weights, build.rank, build.kernels["linear"]
        self._factor = factor
        self._ids, self._dtype = build.rank.span(vocab_size), weights.dtype
        shape = len(self._ids), hidden_size
        self.matrix = Matrix.empty(weights.storage(name).loaded, shape, weights.empty)
        self.own_ids = torch.tensor(self._ids) if build.is_divided else None
        """Tokens for which this rank has rows of embedding and head, or None for all."""
        cut = None if self.own_ids is None else Cut(vocab_size, self.own_ids)
        self.own = [(f"{name}.weight", Parameter(plain_or(self.matrix), cut=cut, take=self._take))]

    def _take(self, matrix: Matrix) -> None:
        """Look up rows in the file: those of few tokens are read."""
        self.matrix = matrix

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix
        if self.own_ids is None and isinstance(matrix.format, Plain):
            hidden = F.embedding(token_ids, matrix.fields["weight"])
        else:
            shape = len(token_ids), matrix.num_columns
            hidden = torch.empty(shape, dtype=self._dtype, device=token_ids.device)
            if self.own_ids is None:
                self._kernel.look_up(matrix, token_ids, hidden)
            else:
                repeated(self._look_up, token_ids, hidden)
                hidden = self._rank.sum(hidden)
        return hidden if self._factor == 1.0 else hidden * self._factor

    def _look_up(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows of this rank's tokens, and zeros for other tokens."""
        own = token_ids - self._ids.start
        is_own = (own >= 0) & (own < len(self._ids))
        found = self.matrix[own.where(is_own, 0)].widened(self._dtype)
        out.copy_(found.where(is_own[:, None], 0.0))


class Head(Composite):
    """Maps hidden states to logits, ``[T, hidden_size]`` to ``[T, vocab_size]``."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embedding: Embedding,
        build: Build,
        factor: float = 1.0,
        *,
        is_tied: bool,
    ) -> None:
        """``factor``: multiplier of the logits. ``is_tied``: True to use the weights of
        ``embedding``."""
        self._join = build.rank.join if build.is_divided else None
        self._vocab_size, self._is_tied = vocab_size, is_tied
        self._factor = factor
        self._linear = Linear(
            embedding.matrix.num_columns,
            [Part(name, vocab_size, embedding.own_ids)],
            build,
            weight=embedding.matrix if is_tied else None,
        )
        self.layers = (self._linear,)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        if not self._is_tied:
            yield from super().parameters()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._linear(hidden)
        if self._join is not None:
            logits = self._join(logits, self._vocab_size)
        return logits if self._factor == 1.0 else logits * self._factor
