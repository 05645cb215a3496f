"""Which state SGLang exports of a prefill: it asks the cache for one position.

An extend saves one state, at its last grid position counted from where it began, or at the position
that ``match_prefix`` named instead (``mamba_branching_seqlen``), if that lies in the extend.
"""

from __future__ import annotations

from hybridcache.api import PrefixMatch
from hybridcache.hybrid import HybridRadixCache
from hybridcache.tokens import Tokens


def branch_position(
    cache: HybridRadixCache, prompt: Tokens, match: PrefixMatch, grid: int
) -> int | None:
    """Where the state is wanted instead of at the extend's end; None: at the end.

    The fork that ``prompt`` opens or widens, ghosts included: the next prompt of its kind resumes
    there. Counted from ``match.cached_len`` in steps of ``grid``, as SGLang's kernels export. Not
    where a conversation only goes on from the end of what was seen: its newest end is worth more.
    O(tokens below ``match.node``), where there is a position at all.
    """
    cached_len = match.cached_len
    seen = min(match.branch_len, len(prompt) - 1)
    position = seen - (seen - cached_len) % grid
    if position <= cached_len or not is_fork(cache, prompt, match):
        return None
    return position


def is_fork(cache: HybridRadixCache, prompt: Tokens, match: PrefixMatch) -> bool:
    """Whether others went on where ``prompt`` leaves what was seen. O(tokens below
    ``match.node``)."""
    tree = cache._tree
    node = match.node or tree.find_root(match.namespace)
    if node is None:
        return False
    node, inside, end = tree.walk(node, prompt[node.end :])
    if inside is None and node.ghosts is not None:
        node, inside, end = tree.walk(node, prompt[end:], ghosts=True)
    return inside is not None or node.children is not None or node.ghosts is not None
