"""Ways to break guided decoding."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import GUIDED

GUIDE = "engine/guided/guide.py"

BREAKS_OF_GUIDED = (
    Mutation(
        "the mask behind a draft is the one before it",
        GUIDE,
        "            self._matcher.consume_token(token)\n            masks.append(self._mask())\n",
        "            masks.append(self._mask())\n            self._matcher.consume_token(token)\n",
        GUIDED,
    ),
    Mutation(
        "tokens of a step that broke off stay taken",
        GUIDE,
        "            self._matcher.rollback(surplus)\n",
        "            pass\n",
        GUIDED,
    ),
    Mutation(
        "drafts go on behind the grammar's end",
        GUIDE,
        "return drafts[: int(ends.argmax())] if ends.any() else drafts",
        "return drafts",
        GUIDED,
    ),
    Mutation(
        "all answers of a grammar share one place in it",
        GUIDE,
        "self._matcher = self._beginning.deep_copy()",
        "self._matcher = self._beginning",
        GUIDED,
    ),
    Mutation(
        "answers that share a grammar share its limits",
        GUIDE,
        "if self._anew is None or not self._matcher.is_error():",
        "if True:",
        GUIDED,
    ),
    Mutation(
        "a grammar that only the empty answer fits is served",
        GUIDE,
        "    allowed[ends] = 0\n",
        "",
        GUIDED,
    ),
)
