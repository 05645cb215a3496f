"""Multi-token prediction: a checkpoint's own head that guesses tokens ahead.

Which row holds what. With h[p] the hidden vector behind the model's final norm at position p, the
head's input at p is ``fc([norm(embedding of token p) | norm(h[p - 1])])``, for p >= 1. Its keys and
values lie in the row of position p, beside the model's own. They depend on the tokens up to p and
on nothing else: not on the token after, nor (there is one layer) on other rows of the head. So

- a row is the same whoever writes it, in whatever chunk, and the tree shares it as it shares the
  model's; rows of rejected tokens are written again with the model's;
- what a sequence takes along is h of its last position, in a state ``hidden``: a checkpoint at s
  carries h[s - 1], from which a request that resumes there writes row s as a cold one does;
- position 0 has no such row. What lies there is never read: the head's keys begin at 1.

``follow`` writes the rows of a step that the model has computed, and moves ``hidden`` on. ``draft``
guesses, from a state that has taken all but the newest token in: it writes to rows of its own, so
nothing has to be rolled back.

Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2, for one head that is chained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from engine.run.layers.attention import Attention
from engine.run.layers.inputs import DecodePart, LayerInputs, pad_rows
from engine.run.layers.linear import Linear, Part
from engine.run.layers.norm import RMSNorm
from engine.run.layers.parameters import Build, Layer, Parameter
from engine.run.layers.residual import FeedForwardStep, MixerStep
from engine.run.layers.rotary import RotaryTable
from engine.run.memory import Pools
from hybridcache.geometry.sizes import Spec, StateSpec
from kernels.attention.sequences import Sequences
from kernels.packed import running_sum
from kernels.upload import upload


class PredictionHead:
    """One layer of attention and an MLP, between a product that takes in the next token and a norm.
    Embeds and reads its guesses as the model does."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        build: Build,
        *,
        norms: tuple[RMSNorm, RMSNorm, RMSNorm],
        attention: MixerStep,
        mlp: FeedForwardStep,
    ) -> None:
        """``norms``: of embeddings, of hidden vectors, and of what leaves."""
        assert isinstance(attention.block, Attention)
        self._attention, self._mlp = attention, mlp
        self._embedding_norm, self._hidden_norm, self._norm = norms
        self._row_multiple: int = build.kernels["linear"].ROWS
        self._fc = Linear(2 * hidden_size, [Part(f"{name}.fc", hidden_size)], build)
        self.keeps: tuple[Spec, ...] = (
            *attention.block.keeps,
            StateSpec("hidden", (hidden_size,), "conv"),
        )
        """Keys, values, and h of a sequence's last position."""

    def _layers(self) -> tuple[Layer, ...]:
        norms = self._embedding_norm, self._hidden_norm, self._norm
        return self._fc, *norms, self._attention, self._mlp

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        for layer in self._layers():
            yield from layer.parameters()

    def seal(self) -> None:
        for layer in self._layers():
            layer.seal()

    def _enter(self, embedded: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The layer's input, ``[num_rows, H]`` as both arguments."""
        parts = self._embedding_norm(embedded), self._hidden_norm(before)
        return self._fc(torch.cat(parts, dim=-1))

    def follow(
        self, embedded: torch.Tensor, hidden: torch.Tensor, inputs: LayerInputs, pools: Pools
    ) -> None:
        """Write the rows of a step's tokens, and h of every sequence where its states go.

        ``embedded``, ``hidden``: ``[num_rows, H]``, the tokens' embeddings and what ``forward``
        left of them. Costs two small products a token: no attention. A step of nothing but decoding
        sequences reads no number on the host, so that it can be captured with the model's.
        """
        *kv, carried = pools
        if inputs.decode is not None and inputs.num_decode == inputs.num_tokens:
            slots = inputs.decode.slots.long()
            before, kept = pad_rows(carried[slots], len(hidden)), hidden[: len(slots)]
        else:
            places = _Places.of(inputs)
            earlier, slots = carried[places.slots()], places.saves()
            before = hidden.roll(1, 0)
            before[places.firsts()] = torch.where(places.resumed()[:, None], earlier, 0)
            kept = hidden[places.saved()]
        projected, _ = self._attention.project(self._enter(embedded, before), None)
        block = self._attention.block
        assert isinstance(block, Attention)
        block.write(projected, inputs, (kv[0], kv[1]))
        carried[slots] = kept

    def draft(
        self,
        embedded: torch.Tensor,
        before: torch.Tensor,
        positions: Sequence[int],
        rows: torch.Tensor,
        rotary: RotaryTable,
        pools: Pools,
    ) -> torch.Tensor:
        """What stands in for h of one token of each of B sequences: ``[B, H]``.

        ``embedded``, ``before`` ``[B, H]``: of the tokens, and h before them (or what this gave for
        it). ``positions`` of the tokens, 1 or more. ``rows``: int32 ``[B, M]``, where the head's
        rows of positions 1, 2, ... lie; that of the token is written.
        """
        count, device = len(positions), embedded.device
        num_rows = -(-count // self._row_multiple) * self._row_multiple
        at = upload(positions, torch.int64, device)
        cos, sin = rotary(at)
        inputs = LayerInputs(
            num_tokens=count,
            num_decode=count,
            num_rows=num_rows,
            cos=cos,
            sin=sin,
            kv_indices=rows.gather(1, at[:, None] - 1)[:, 0].long(),
            table=rows,
            decode=DecodePart(
                Sequences.of(range(count), positions, device),
                torch.empty(0, dtype=torch.int32, device=device),
            ),
            prefill=None,
        )
        entered = self._enter(pad_rows(embedded, num_rows), pad_rows(before, num_rows))
        projected, residual = self._attention.project(entered, None)
        mixed = self._attention.block.mix(projected, inputs, pools[:2])
        hidden = self._attention.finish(mixed, projected)
        hidden, residual = self._mlp(hidden, residual, count)
        return self._norm.add(hidden, residual)[0][:count]


class _Places:
    """Which tokens of a step begin a sequence's part of it, and whose h is kept where. Tokens are
    the host's numbers, slots the device's: nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._firsts: list[int] = []
        self._slots: list[torch.Tensor] = []
        self._resumed: list[torch.Tensor] = []
        self._saved: list[int] = []
        self._saves: list[torch.Tensor] = []

    @classmethod
    def of(cls, inputs: LayerInputs) -> _Places:
        made = cls(inputs.kv_indices.device)
        if inputs.decode is not None:
            made._add(range(inputs.num_decode), inputs.decode.slots, None)
            made._save(range(inputs.num_decode), inputs.decode.slots)
        if inputs.verify is not None:
            part, first = inputs.verify, inputs.num_decode
            starts = running_sum(part.packed.lengths)[:-1]
            made._add([first + start for start in starts], part.slots, None)
            made._save(range(first, first + inputs.num_verify), part.step_slots)
        if inputs.prefill is not None:
            filled, first = inputs.prefill, inputs.num_decode + inputs.num_verify
            bounds = [first + bound for bound in running_sum(filled.packed.lengths)]
            made._add(bounds[:-1], filled.slots, filled.resumed)
            made._save([end - 1 for end in bounds[1:]], filled.slots)
            if filled.exports is not None:
                exports = filled.exports
                ends = zip(exports.sequences, exports.ends, strict=True)
                made._save([bounds[rank] + end - 1 for rank, end in ends], exports.tables.slots)
        return made

    def _add(
        self, firsts: Sequence[int], slots: torch.Tensor, resumed: torch.Tensor | None
    ) -> None:
        self._firsts += firsts
        self._slots.append(slots)
        self._resumed.append(torch.ones_like(slots).bool() if resumed is None else resumed)

    def _save(self, tokens: Sequence[int], slots: torch.Tensor) -> None:
        self._saved += tokens
        self._saves.append(slots)

    def firsts(self) -> torch.Tensor:
        """int64[sequences]: the first token of each."""
        return upload(self._firsts, torch.int64, self._device)

    def slots(self) -> torch.Tensor:
        """int64[sequences]: where the h before that token is."""
        return torch.cat(self._slots).long()

    def resumed(self) -> torch.Tensor:
        """bool[sequences]: there is one."""
        return torch.cat(self._resumed)

    def saved(self) -> torch.Tensor:
        """int64[S]: tokens whose h is kept."""
        return upload(self._saved, torch.int64, self._device)

    def saves(self) -> torch.Tensor:
        """int64[S]: the slots it goes to."""
        return torch.cat(self._saves).long()
