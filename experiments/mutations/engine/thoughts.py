"""Ways to break the budget of reasoning."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import THOUGHTS

LIMIT = "engine/requests/thoughts.py"

BREAKS_OF_THOUGHTS = (
    Mutation(
        "reasoning that has ended is ended again",
        LIMIT,
        "is_thinking = CLOSE not in text and (",
        "is_thinking = (",
        THOUGHTS,
    ),
    Mutation(
        "an answer that does not reason is made to end it",
        LIMIT,
        "self._is_open or text.lstrip().startswith(OPEN)",
        "True",
        THOUGHTS,
    ),
    Mutation(
        "the mark that opens reasoning counts as reasoning",
        LIMIT,
        "budget + len(opening)",
        "budget",
        THOUGHTS,
    ),
    Mutation(
        "reasoning is ended without its last token being known",
        "engine/requests/token_rules.py",
        "self.thoughts is not None and draw == self.thoughts.first",
        "False",
        THOUGHTS,
    ),
)
