"""Ways to break what a step has for prefills: its budget and its plan."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import (
    DRAFTS,
    FAIR,
    STEPS,
)

PLAN = "engine/schedule/plan.py"
BUDGET = "engine/schedule/budget.py"

BREAKS_OF_PLAN = (
    Mutation(
        "a token that the host knows is taken for a late one",
        PLAN,
        "is_late=end > request.num_tokens",
        "is_late=end >= request.num_tokens",
        STEPS,
    ),
    Mutation(
        "a tile of a few tokens costs nothing",
        BUDGET,
        "self.tiles -= -(-num_tokens // TILE)",
        "self.tiles -= num_tokens // TILE",
        FAIR,
    ),
    Mutation(
        "a step begins any number of tiles",
        BUDGET,
        "return self.tokens <= 0 or self.tiles <= 0",
        "return self.tokens <= 0",
        FAIR,
    ),
    Mutation(
        "a late token is not drawn from",
        PLAN,
        "samples=end == request.known_len < request.max_len",
        "samples=end == request.num_tokens < request.max_len",
        STEPS,
    ),
    Mutation(
        "segments do not say whose they are",
        PLAN,
        "            namespace=self.request.namespace,\n",
        "            namespace=None,\n",
        STEPS,
    ),
    Mutation(
        "a wrong guess is taken",
        PLAN,
        "            if run[-1].token_id != guess:\n                break\n",
        "",
        DRAFTS,
    ),
    Mutation(
        "no part of a step is for short prompts",
        BUDGET,
        "min(tokens // SHORT_SHARE, tokens - TILE) if is_shared else 0",
        "0",
        FAIR,
    ),
    Mutation(
        "short prompts leave less than a tile to the others",
        BUDGET,
        "min(tokens // SHORT_SHARE, tokens - TILE)",
        "tokens // SHORT_SHARE",
        FAIR,
    ),
    Mutation(
        "short prompts take more than their part",
        BUDGET,
        "SHORT_SHARE = 4",
        "SHORT_SHARE = 2",
        FAIR,
    ),
    Mutation(
        "a long prompt takes the short ones' part",
        BUDGET,
        "tokens = max(0, self.tokens - self.num_for_short)",
        "tokens = self.tokens",
        FAIR,
    ),
    Mutation(
        "a long prompt's positions are scored without a limit",
        BUDGET,
        "return min(tokens, self.scored) if scores else tokens",
        "return tokens",
        FAIR,
    ),
    Mutation(
        "a short prompt's positions are scored without a limit",
        BUDGET,
        "(min(short, self.scored) if scores else short)",
        "short",
        FAIR,
    ),
    Mutation(
        "a short prompt takes what is taken already",
        BUDGET,
        "short = min(self.num_for_short, self.tokens)",
        "short = self.num_for_short",
        FAIR,
    ),
    Mutation(
        "a prefill takes more than its rest",
        BUDGET,
        "else min(rest, self.room(scores))",
        "else self.room(scores)",
        FAIR,
    ),
    Mutation(
        "scored positions are not counted",
        BUDGET,
        "        self.scored -= num_tokens * scores\n",
        "",
        FAIR,
    ),
    Mutation(
        "every position counts as scored",
        BUDGET,
        "self.scored -= num_tokens * scores",
        "self.scored -= num_tokens",
        FAIR,
    ),
)
