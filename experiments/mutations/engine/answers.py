"""Ways to break answers: requests, the engine's step, the sampler."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import COUNTS, DRAWS, GUIDED, OPTIONS, STEPS

REQUEST = "engine/requests/request.py"
SAMPLER = "engine/run/sampler.py"
SAMPLE_STEP = "engine/run/sample_step.py"
TOKEN_COUNTS = "engine/requests/token_counts.py"
ENGINE_LOOP = "engine/engine.py"

BREAKS_OF_ANSWERS = (
    Mutation(
        "an answer is one token too long",
        REQUEST,
        "        elif self.num_tokens >= self.max_len:\n",
        "        elif self.num_tokens > self.max_len:\n",
        STEPS,
    ),
    Mutation(
        "a draw's number forgets tokens in flight",
        REQUEST,
        "draw = self.known_len - 1 - self.prompt_len\n",
        "draw = self.num_tokens - self.prompt_len\n",
        STEPS,
    ),
    Mutation(
        "a request with penalties passes for a plain one",
        REQUEST,
        "rules is NO_RULES and not self.params.has_penalties\n",
        "rules is NO_RULES\n",
        COUNTS,
    ),
    Mutation(
        "a request with a grammar passes for a plain one",
        REQUEST,
        "self._is_plain = guide is None and rules is NO_RULES",
        "self._is_plain = rules is NO_RULES",
        GUIDED,
    ),
    Mutation(
        "a request with rules for tokens passes for a plain one",
        REQUEST,
        "self._is_plain = guide is None and rules is NO_RULES",
        "self._is_plain = guide is None",
        OPTIONS,
    ),
    Mutation(
        "a report repeats what was reported",
        REQUEST,
        "        self._reported = self.num_tokens\n        new_text",
        "        new_text",
        STEPS,
    ),
    Mutation(
        "a scored prompt's token is drawn from its first row",
        SAMPLE_STEP,
        "            rows += range(num_rows - len(drawn_for), num_rows)\n",
        "            rows += range(first, first + len(drawn_for))\n",
        STEPS,
    ),
    Mutation(
        "a prompt's tokens are scored one place too early",
        SAMPLE_STEP,
        "request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]",
        "request.tokens[task.start : min(task.end, request.prompt_len)]",
        STEPS,
    ),
    # -- the engine's step
    Mutation(
        "an empty step counts as in flight",
        ENGINE_LOOP,
        "in_flight if in_flight.plan.tasks else None",
        "in_flight",
        STEPS,
    ),
    Mutation(
        "a step that broke off is committed",
        ENGINE_LOOP,
        "            self._in_flight = None\n            interrupted",
        "            interrupted",
        STEPS,
    ),
    Mutation(
        "a step that is not overlapped is committed one late",
        ENGINE_LOOP,
        "        if not self._overlaps:\n            return in_flight\n",
        "",
        STEPS,
    ),
    # -- the sampler
    Mutation("a draw forgets its seed", SAMPLER, "z = (seed * 0x", "z = (0 * 0x", DRAWS),
    Mutation("a draw forgets its number", SAMPLER, "+ (draw + 1) * 0x9E", "+ 1 * 0x9E", DRAWS),
    Mutation(
        "the likeliest token is chosen before penalties",
        SAMPLER,
        "return scores.argmax(dim=-1)",
        "return logits.argmax(dim=-1)",
        DRAWS,
    ),
    Mutation(
        "penalties are written into the model's logits",
        SAMPLER,
        "scores = logits.to(torch.float32, copy=True)",
        "scores = logits.to(torch.float32)",
        DRAWS,
    ),
    Mutation(
        "a repetition in the answer costs nothing",
        SAMPLER,
        "np.full(len(numbers), params.repetition_penalty)",
        "np.where(numbers > 0, 1.0, params.repetition_penalty)",
        DRAWS,
    ),
    Mutation(
        "a repetition makes an unlikely token likelier",
        SAMPLER,
        "torch.where(found > 0, found / factor, found * factor) - less",
        "found / factor - less",
        DRAWS,
    ),
    Mutation(
        "a frequent token is penalised once",
        SAMPLER,
        "params.frequency_penalty * numbers",
        "params.frequency_penalty * (numbers > 0)",
        DRAWS,
    ),
    Mutation(
        "a token counts as present when it is in the prompt",
        SAMPLER,
        "params.presence_penalty * (numbers > 0)",
        "params.presence_penalty * (numbers >= 0)",
        DRAWS,
    ),
    Mutation(
        "penalties of one row fall on another",
        SAMPLER,
        "index.append(request.counts.ids + row * logits.shape[-1])",
        "index.append(request.counts.ids)",
        DRAWS,
    ),
    Mutation(
        "who is drawn beside others is drawn before penalties",
        SAMPLER,
        "_pick(scores, rows).float()",
        "_pick(logits, rows).float()",
        DRAWS,
    ),
    # -- how often a token stands in an answer
    Mutation(
        "the prompt's tokens repeat nothing",
        REQUEST,
        "self._buffer[: self.prompt_len if repeats else 0]",
        "self._buffer[:0]",
        COUNTS,
    ),
    Mutation(
        "an answer is counted once, and not as it grows",
        REQUEST,
        "        self._counts.count(self.output)\n        return self._counts\n",
        "            self._counts.count(self.output)\n        return self._counts\n",
        COUNTS,
    ),
    Mutation(
        "what was counted is counted again",
        TOKEN_COUNTS,
        "        self.num_counted = len(output)\n",
        "",
        COUNTS,
    ),
    Mutation(
        "a token is counted once",
        TOKEN_COUNTS,
        "self._numbers[at] += 1",
        "self._numbers[at] = 1",
        COUNTS,
    ),
    Mutation(
        "a prompt's token counts as answered",
        TOKEN_COUNTS,
        "np.zeros(len(self._ids), np.int32)",
        "np.ones(len(self._ids), np.int32)",
        COUNTS,
    ),
    Mutation(
        "a new token takes the place of the one before it",
        TOKEN_COUNTS,
        "self._at.setdefault(token, len(self._at))",
        "self._at.setdefault(token, max(len(self._at) - 1, 0))",
        COUNTS,
    ),
    Mutation(
        "what was counted is lost where the arrays grow",
        TOKEN_COUNTS,
        "np.concatenate([self._numbers, np.zeros(at + 64, np.int32)])",
        "np.zeros(2 * at + 64, np.int32)",
        COUNTS,
    ),
    Mutation(
        "draws are looked up with a batch mate's number",
        SAMPLER,
        "_column([uniform(q.seed, q.draw) for q in requests], sums)",
        "_column([uniform(q.seed, q.draw) for q in requests[::-1]], sums)",
        DRAWS,
    ),
    Mutation(
        "a draw of zero picks a token that was left out",
        SAMPLER,
        "torch.searchsorted(sums, points, right=True)",
        "torch.searchsorted(sums, points, right=False)",
        DRAWS,
    ),
    Mutation(
        "log-probabilities of one row are given to another",
        SAMPLER,
        "            if num_top is None:\n                sampled",
        "            if num_top is None and next(scored):\n                sampled",
        DRAWS,
    ),
    Mutation(
        "as few alternatives are found as anybody wants",
        SAMPLER,
        "most = max(num_top or 0 for num_top in wanted)",
        "most = min(num_top or 0 for num_top in wanted)",
        DRAWS,
    ),
)
