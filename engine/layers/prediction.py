"""Multi-token prediction: a head of the checkpoint that drafts tokens.

Let h[p] be the hidden vector after the model's final norm at position p. The head's input at p is
``fc([norm(embedding of token p) | norm(h[p - 1])])``, for p >= 1. Its keys and values are stored in
the row of position p, next to the model's. They depend only on the tokens up to p: not on the token
after, nor (there is one layer) on other rows of the head. So

- a row has the same contents in any chunk, and the tree shares it like the model's rows; rows of
  rejected tokens are overwritten together with the model's;
- the only state of a sequence is h of its last position, in a state ``hidden``: a checkpoint at s
  contains h[s - 1], from which a request that resumes there writes row s as a cold one does;
- position 0 has no such row. The contents of its row are never read: the head's keys begin at 1.

``follow`` writes the rows of a step that the model has computed, and updates ``hidden``. ``draft``
drafts tokens from a state that includes all but the newest token. It writes to separate rows, so
nothing has to be rolled back.

Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2, with one head that is chained.
"""

from __future__ import annotations

import torch

from engine.layers.attention import Attention
from engine.layers.blocks import (
    DecodePart,
    FeedForwardStep,
    LayerInputs,
    MixerStep,
    Pools,
    RMSNorm,
    Rows,
    VerifyPart,
    pad_rows,
    padded_count,
)
from engine.layers.rotary import RotaryTable
from engine.weights.parameters import Build, Composite
from engine.weights.products import Linear, Part
from hybridcache.geometry.sizes import Spec
from kernels.attention.sequences import Sequences
from kernels.packed import running_sum
from kernels.upload import upload


class PredictionHead(Composite):
    """One layer of attention and an MLP, between a product that adds the next token and a norm.
    Embedding and logits are those of the model."""

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
        """``norms``: those of embeddings, of hidden vectors, and of the output."""
        assert isinstance(attention.block, Attention)
        self._attention, self._mlp = attention, mlp
        self._embedding_norm, self._hidden_norm, self._norm = norms
        self._row_multiple: int = build.kernels["linear"].ROWS
        self._fc = Linear(2 * hidden_size, [Part(f"{name}.fc", hidden_size)], build)
        self.layers = self._fc, *norms, attention, mlp
        self.keeps: tuple[Spec, ...] = (
            *attention.block.keeps,
            Spec("hidden", (hidden_size,), "conv"),
        )
        """Keys, values, and h of a sequence's last position."""

    def _enter(self, embedded: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the layer's input, ``[num_rows, H]`` like both arguments."""
        parts = self._embedding_norm(embedded), self._hidden_norm(before)
        return self._fc(torch.cat(parts, dim=-1))

    def follow(
        self, embedded: torch.Tensor, hidden: torch.Tensor, inputs: LayerInputs, pools: Pools
    ) -> None:
        """Write the rows of a step's tokens, and the new h of every sequence to its slots.

        ``embedded`` and ``hidden`` are ``[num_rows, H]``: the tokens' embeddings, and the result of
        ``forward`` for them. Reads no value of the device on the host, so that it can be captured
        with the model's step.
        """
        carried = pools[-1]
        before, kept = _trail(hidden, inputs, carried)
        before = pad_rows(before, len(hidden))
        normed, _ = self._attention.enter(self._enter(embedded, before), None)
        block = self._attention.block
        projected = block.project(normed)
        assert isinstance(block, Attention)
        block.write(projected, inputs, pools[:2])
        for slots, last in kept:
            carried[slots] = last

    def draft(
        self,
        embedded: torch.Tensor,
        before: torch.Tensor,
        positions: torch.Tensor,
        kv_indices: torch.Tensor,
        rows: torch.Tensor,
        sequences: Sequences,
        rotary: RotaryTable,
        pools: Pools,
    ) -> torch.Tensor:
        """Return an approximation of h for one token of each of B sequences: ``[B, H]``.

        ``embedded`` and ``before`` are ``[B, H]``: those of the tokens, and h before them (or a
        result of this function). ``positions`` are those of the tokens, 1 or more, and
        ``kv_indices`` the rows to write: int64 ``[B]``. ``rows`` is int32 ``[B, M]``: the head's
        rows of positions 1, 2, ..., of the ``sequences``.
        """
        count = len(positions)
        num_rows = padded_count(count, self._row_multiple)
        inputs = LayerInputs(
            num_tokens=count,
            num_rows=num_rows,
            angles=rotary(positions),
            kv_indices=kv_indices,
            table=rows,
            parts=[DecodePart(count, sequences, rows.new_empty(0))],
        )
        entered = self._enter(pad_rows(embedded, num_rows), pad_rows(before, num_rows))
        normed, residual = self._attention.enter(entered, None)
        block = self._attention.block
        projected = block.project(normed)
        mixed = block.mix(projected, inputs, pools[:2])
        hidden = self._attention.leave(block.finish(mixed, projected))
        normed, residual = self._mlp.enter(hidden, residual)
        hidden = self._mlp.leave(self._mlp.block(normed, Rows(count)))
        return self._norm.add(hidden, residual)[0][: inputs.num_tokens]


def _trail(
    hidden: torch.Tensor, inputs: LayerInputs, carried: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the h before each token, and (slots, vectors for them) to store.

    ``hidden`` is the result of the step; ``carried`` has each sequence's h before it.
    """
    befores: list[torch.Tensor] = []
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    num_done = 0
    for part in inputs.parts:
        own = hidden[num_done : num_done + part.num_tokens]
        num_done += part.num_tokens
        slots = part.slots.long()
        if isinstance(part, DecodePart):
            befores.append(carried[slots])
            kept.append((slots, own))
        elif isinstance(part, VerifyPart):
            befores.append(torch.cat([own, carried[slots]])[part.before])
            kept.append((part.step_slots.long(), own))
        else:
            bounds = running_sum(part.packed.lengths)
            firsts, lasts = (
                upload(ends, torch.int64, hidden.device)
                for ends in (bounds[:-1], [end - 1 for end in bounds[1:]])
            )
            before = own.roll(1, 0)
            before[firsts] = torch.where(part.resumed[:, None], carried[slots], 0)
            befores.append(before)
            kept.append((slots, own[lasts]))
            if part.exports is not None:
                ends = zip(part.exports.sequences, part.exports.ends, strict=True)
                tokens = [bounds[index] + end - 1 for index, end in ends]
                saved = own[upload(tokens, torch.int64, hidden.device)]
                kept.append((part.exports.tables.slots.long(), saved))
    return befores[0] if len(befores) == 1 else torch.cat(befores), kept
