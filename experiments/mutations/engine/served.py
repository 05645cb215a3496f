"""Ways to break what a server shows and remembers: the page's feed, one node, explanations."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import HEAP, LIVING, PAGE, SEEN

FEED = "engine/server/feed.py"
MEMORY_OF_REQUESTS = "engine/history/memory.py"

BREAKS_OF_SERVED = (
    Mutation(
        "an answer waits for the acknowledgement of the one before",
        "engine/server/listening.py",
        "socket.SOCK_STREAM, socket.IPPROTO_TCP)",
        "socket.SOCK_STREAM)",
        LIVING,
    ),
    Mutation(
        "a server keeps what is free",
        "engine/server/app.py",
        "                callback_notify=trim,\n",
        "",
        HEAP,
    ),
    Mutation(
        "numbers of another watch are believed",
        FEED,
        "        if name != self._name or not number.isdecimal()",
        "        if not number.isdecimal()",
        PAGE,
    ),
    Mutation(
        "a reader that lags is sent on over a gap",
        FEED,
        "(bool(self._kept) and self._kept[0].number <= number + 1)",
        "bool(self._kept)",
        PAGE,
    ),
    Mutation(
        "a tenant's node shows its tokens",
        "engine/watch.py",
        '"tokens": None if root.key is not None else node',
        '"tokens": node',
        PAGE,
    ),
    Mutation(
        "a request is explained beside another tenant's",
        MEMORY_OF_REQUESTS,
        " if known is not None and known.outline.namespace == namespace else None",
        "",
        SEEN,
    ),
    Mutation(
        "a field is found one character late",
        "engine/history/locate.py",
        "        if mark.start() - before > num_chars:",
        "        if mark.start() - before >= num_chars:",
        SEEN,
    ),
)
