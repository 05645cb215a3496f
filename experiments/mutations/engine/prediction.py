"""Ways to break drafts of a multi-token head: what it follows, what it carries, what it reads."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import DRAFTERS, DRAFTS, HEADS

HEAD, PREDICT = "engine/run/layers/prediction.py", "engine/run/predict.py"
WAITING = "engine/run/head_rows.py"
TRIES, DRAFTING = "engine/drafts/tries.py", "engine/drafts/drafting.py"
RUNNER, INPUTS = "engine/run/model_runner.py", "engine/run/layers/inputs.py"

BREAKS_OF_PREDICTION = (
    Mutation(
        "the head does not follow what is computed",
        RUNNER,
        "        hidden = self.model.forward(token_ids, step, mixers)\n"
        "        if self._predictor is not None:\n",
        "        hidden = self.model.forward(token_ids, step, mixers)\n        if False:\n",
        HEADS,
    ),
    Mutation(
        "the vector that a verification ends with is that of its last guess",
        HEAD,
        "        kept.append((part.step_slots.long(), own))\n",
        "        kept.append((part.step_slots.long(), own[-1:].expand_as(own)))\n",
        HEADS,
    ),
    Mutation(
        "a checkpoint inside a prefill has no vector",
        HEAD,
        "            kept.append((exports.tables.slots.long(), saved))\n",
        "",
        HEADS,
    ),
    Mutation(
        "a resumed prefill begins from nothing",
        HEAD,
        "torch.where(filled.resumed[:, None], carried[slots], 0)",
        "torch.zeros_like(carried[slots])",
        HEADS,
    ),
    Mutation(
        "the first token of a verification follows its neighbour's last",
        INPUTS,
        "    before[running_sum(lengths)[:-1]] = num_tokens + np.arange(len(lengths))\n",
        "    before[0] = num_tokens\n",
        HEADS,
    ),
    Mutation(
        "requests share the rows of their guesses",
        PREDICT,
        "end, own = request.position - 1, self._first_row + b * depth",
        "end, own = request.position - 1, self._first_row",
        HEADS,
    ),
    Mutation(
        "a guess is written over the row before it",
        PREDICT,
        "            columns[1:, :count] = ahead[step, :, :count]\n",
        "            columns[1, :count] = ahead[step, 0, :count]\n",
        HEADS,
    ),
    Mutation(
        "rows wait whatever comes",
        WAITING,
        "        if is_full or rows != self._rows or _changes(batch):",
        "        if is_full or not rows:",
        HEADS,
    ),
    Mutation(
        "a guess does not wait for rows that wait",
        PREDICT,
        "        self.pending.settle()\n",
        "",
        HEADS,
    ),
    Mutation(
        "a row that waits takes in its neighbour's vector",
        WAITING,
        "        self._write_rows(hidden[:count], self._befores",
        "        self._write_rows(hidden[:count].roll(1, 0), self._befores",
        HEADS,
    ),
    Mutation(
        "the first row that waits takes in what another left",
        WAITING,
        "            befores[:width] = carried[slots]\n",
        "            pass\n",
        HEADS,
    ),
    Mutation(
        "rows of a head are sent before they are computed",
        "engine/run/unit.py",
        "        self._settle()\n        pools = self._parts[part]\n"
        "        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)\n"
        "        return",
        "        pools = self._parts[part]\n"
        "        index = upload(rows.astype(np.int64), torch.int64, pools[0].device)\n"
        "        return",
        HEADS,
    ),
    Mutation(
        "what a broken step left of a head waits",
        "engine/run/model_runner.py",
        "        logits = self._logits(batch, drawn)\n        if self._predictor is not None:\n"
        "            self._predictor.pending.count()\n",
        "        if self._predictor is not None:\n            self._predictor.pending.count()\n"
        "        logits = self._logits(batch, drawn)\n",
        HEADS,
    ),
    Mutation(
        "a head guesses from the vector of an earlier step",
        "engine/run/model_runner.py",
        "one._replace(slot=self.running.at(one.slot))",
        "one",
        HEADS,
    ),
    Mutation(
        "texts of one namespace are guessed from in another",
        "engine/drafts/tree.py",
        "if namespace == request.namespace]",
        "]",
        DRAFTERS,
    ),
    Mutation(
        "texts outlive the cache",
        "engine/drafts/tree.py",
        "        self._ended.clear()\n",
        "",
        DRAFTERS,
    ),
    Mutation(
        "an emptied cache is not told to drafters",
        "engine/engine.py",
        "            self._drafting.reset()\n",
        "            pass\n",
        DRAFTS,
    ),
    Mutation(
        "tries that stay wrong come as often as ever",
        TRIES,
        "self._gap = min(2 * self._gap, MAX_GAP)",
        "self._gap = MIN_REST",
        DRAFTERS,
    ),
    Mutation(
        "every request tries when it likes",
        DRAFTING,
        "if turns.is_trying and due < self._tries.opens:",
        "if False:",
        DRAFTERS,
    ),
    Mutation(
        "one drafter takes every try",
        DRAFTING,
        "sorted(trying, key=self._tried.__getitem__)[1:]",
        "trying[1:]",
        DRAFTERS,
    ),
    Mutation(
        "rows wait beyond a step that gives some of theirs away",
        WAITING,
        " or not grows\n",
        "\n",
        HEADS,
    ),
)
