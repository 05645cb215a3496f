"""Positions at which the requests of vLLM save states, and their losses by cause."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from hybridcache.policies.placement import ANSWER_END, HEADER
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.protocol import Placed, PlacementPolicy, Prefill, end_of_prompt
from hybridcache.vllm import NAME
from hybridcache.vllm.pool import WORDS, BlockTree, Layout

logger = init_logger(f"vllm.{__name__}")
FADING = 1 - 1 / 64
"""Weight of earlier hits of a simulated host, per prompt."""
HINTS = ("boundaries", "explain", "session", "session_end", "returns_within_s")


@dataclass(slots=True, eq=False)
class Track:
    """Progress of one request through the cache."""

    match: PrefixMatch | None = None
    """Match that the request resumes from. None if it may not read the cache."""
    cached_len: int = 0
    """Resumed length, tokens."""
    is_planned: bool = False
    is_waiting: bool = False
    """True in a step in which another request computes a deeper state for the same prompt."""
    is_cold: bool = False
    """True after a hit that does not fit into an empty pool: all of the prompt is computed."""
    is_running: bool = False
    is_loading: bool = False
    """True while a connector writes the blocks of the request."""
    missed: PrefixMatch | None = None
    """Match whose missed state a connector may still bring."""
    num_loaded: int = 0
    """Tokens that a connector brings."""
    stops: dict[int, Placed] = field(default_factory=dict)
    """Planned checkpoints that are not saved yet, by position in tokens."""
    interval: int = 0
    """Distance of the states of the answer, tokens. 0 saves none."""
    copy: list[KVCacheBlock] = field(default_factory=list)
    """Blocks of the rolling copy of the answer's last state. Empty if there is none."""
    copied_len: int = 0
    """Position of that state, tokens."""
    causes: dict[str, int] = field(default_factory=dict)
    """Prompt tokens that are computed, by cause, and those that are cached. Empty if the request
    may not read the cache."""

    @property
    def num_pending(self) -> int:
        """Number of states that a running request will still take blocks for."""
        return (len(self.stops) + (self.interval > 0 and not self.copy)) * self.is_running

    def note(self, found: PrefixMatch, match: PrefixMatch, num_tokens: int, layout: Layout) -> None:
        """Note the match of a prompt of ``num_tokens``, and the one to resume from."""
        self.match, self.cached_len = match, layout.tokens(match.cached_len)
        lost = {name: layout.tokens(num) for name, num in found.losses._asdict().items() if num}
        # The last part of the prompt, less than a unit, is in no unit of the tree.
        num_rest = num_tokens - self.cached_len - sum(lost.values())
        lost["below_grid"] = lost.get("below_grid", 0) + num_rest
        self.causes = {"cached": self.cached_len, **lost}

    def note_load(self, num_local: int, num_loaded: int) -> None:
        """Note that a connector brings ``num_loaded`` tokens after the ``num_local`` cached ones,
        which replace the end of the match, or need no state."""
        self.num_loaded, self.cached_len = num_loaded, num_local + num_loaded
        if self.causes:
            causes = {"cached": num_local, "loaded": num_loaded}
            rest = sum(self.causes.values()) - self.cached_len
            for cause, count in reversed(self.causes.items()):  # What is at the end is computed.
                if cause != "cached" and min(count, rest):
                    causes[cause], rest = min(count, rest), rest - min(count, rest)
            self.causes = causes


def hint(request: Request, name: str) -> Any:
    """Return the hint ``hybridcache_NAME`` in ``extra_args`` of a request, or None.

    Wrong hints are ignored and counted: a client's mistake must not stop the engine.
    """
    params = request.sampling_params
    return None if params is None else (params.extra_args or {}).get(f"{NAME}_{name}")


def boundaries_of(request: Request) -> tuple[int, ...]:
    """Return the declared positions that later prompts share, ascending, and count wrong hints."""
    given = hint(request, "boundaries")
    found, wrong = set[int](), list[str]()
    try:
        declared = {int(one) for one in given or ()}
        found = {one for one in declared if 0 < one <= request.num_tokens}
        if found != declared:
            wrong = [f"a position outside 1 to {request.num_tokens} in hybridcache_boundaries"]
    except (TypeError, ValueError):
        wrong = [f"hybridcache_boundaries={given!r}"]
    params = request.sampling_params
    for name in (params and params.extra_args) or ():
        if name.startswith(f"{NAME}_") and name.removeprefix(f"{NAME}_") not in HINTS:
            wrong.append(name)
    for one in wrong:
        WRONG_HINTS.inc()
        logger.warning_once(
            "Ignored a wrong hint of a request: %s. Known are hybridcache_boundaries, a list of "
            "positions in the prompt, and hybridcache_explain. Others are only counted.",
            one,
        )
    return tuple(sorted(found))


# These counters are next to those of vLLM in its ``/metrics``. The scheduler runs in a process of
# its own: they are shown if ``PROMETHEUS_MULTIPROC_DIR`` is set, as vLLM does with several servers.
PROMPT_TOKENS = Counter("hybridcache_prompt_tokens", "Prompt tokens: hits and losses.", ["cause"])
WRONG_HINTS = Counter("hybridcache_wrong_hints", "Hints of requests that were ignored.")
COPIED_BYTES = Counter("hybridcache_copied_bytes", "Bytes of block copies for states of answers.")


class SimulatedHost:
    """Memory of a host, simulated on the block hashes of prompts whose states are at multiples of
    one grid: which of them it would have, in the order of their last use.

    Each prompt uses its whole blocks of rows, and saves states at its end, at the end of what was
    seen before, and at declared boundaries. States at any unit bring the most tokens each. Those at
    ends of blocks are shared by more prompts and need no part of a block, so that fewer fill the
    host.
    """

    def __init__(self, num_blocks: int, layout: Layout, grid: int) -> None:
        self.num_blocks, self.layout, self.grid = num_blocks, layout, grid
        self.hits = 0.0
        """Tokens of the latest hits; earlier ones fade."""
        self._costs: dict[Any, int] = {}
        """Blocks of each state, by hash, and of each block of rows, by a tuple of its hash. Least
        recently used first."""
        self._num_used = 0

    def serve(self, request: Request, shared: Iterable[int]) -> None:
        """Count the hit of a prompt, and save its states, also at the ``shared`` positions."""
        costs, hashes, grid = self._costs, request.block_hashes, self.grid
        unit, size, num_tokens = self.layout.unit, self.layout.block_size, request.num_tokens
        rows = [(hashes[end // unit - 1],) for end in range(size, num_tokens + 1, size)]
        num_rows = next((at for at, one in enumerate(rows) if one not in costs), len(rows))
        last = min(num_tokens - 1, (num_rows + 1) * size - 1) // grid * grid
        hit = next((at for at in range(last, 0, -grid) if hashes[at // unit - 1] in costs), 0)
        self.hits = FADING * self.hits + hit
        ends = sorted({at // grid * grid for at in (hit, num_tokens, *shared)} - {0})
        used = dict.fromkeys(rows, 1)
        for at in ends:
            used[hashes[at // unit - 1]] = len(self.layout.states) + (at % size > 0)
        for key, cost in reversed(used.items()):
            self._num_used += cost - costs.pop(key, 0)
            costs[key] = cost
        while self._num_used > self.num_blocks:
            self._num_used -= costs.pop(next(iter(costs)))


class Places:
    """Decisions of a placement policy, in tokens.

    Policies count in rows of the tree, as its items do: a unit is ``WORDS`` long for them.
    """

    def __init__(self, policy: PlacementPolicy, tree: BlockTree, saves_answers: bool) -> None:
        self.policy, self.tree, self.saves_answers = policy, tree, saves_answers
        self.num_computed = self._calm_at = 0
        """Tokens computed so far, and those at which an overload is over."""
        self._has_asked = False
        """True after the first request for the state of an answer, saved or evicted."""
        self.num_host_blocks = 0
        self._hosts: list[SimulatedHost] = []
        """A simulation of the host's memory for each possible grid."""

    def use_host(self, num_blocks: int) -> None:
        """Plan for host memory of ``num_blocks`` too. The states of prompts are at ends of blocks
        while a host with these would bring more tokens than one with states at any unit. Until that
        is known they are there if the host is small: most of it then repeats what the device has.
        """
        layout, is_small = self.tree.layout, num_blocks <= 2 * self.tree.pool.num_gpu_blocks
        self.num_host_blocks = num_blocks
        grids = sorted((layout.unit, layout.block_size), reverse=is_small)
        self._hosts = [SimulatedHost(num_blocks, layout, grid) for grid in grids if num_blocks]

    def note_overload(self) -> None:
        """Note that a request is preempted, or waits for blocks. It counts until as many tokens as
        the pool holds are computed: then all that was saved before it is gone."""
        held = self.tree.pool.num_gpu_blocks * self.tree.layout.block_size
        self._calm_at = self.num_computed + held

    def plan(
        self,
        request: Request,
        track: Track,
        found: PrefixMatch,
        match: PrefixMatch,
        num_pending: int,
    ) -> None:
        """Plan the checkpoints of a new request that resumes from ``match``, and notify the policy
        of it. Running requests will take blocks for ``num_pending`` states."""
        policy, layout, cache = self.policy, self.tree.layout, self.tree.cache
        unit, num_groups, drop = layout.unit, len(layout.states), layout.drop * WORDS
        lost = [one for one in cache.evicted(found) if one.position > match.cached_len]
        for one in lost:  # Policies count this request too. `touch` does when it is admitted.
            one.earlier_uses += 1
        if match.resumed is not None:
            policy.on_hit(match.resumed)
        track.missed, asked = found, match.resumed or found.missed
        self._has_asked |= asked is not None and asked.label == ANSWER_END[0]
        # The part of a unit at the end is at least one row, and less than a unit.
        rest = min(-(-(request.num_tokens % unit) * WORDS // unit), WORDS - 1)
        # The policy takes a boundary in the last unit, however long, for the end of the prompt.
        ends = boundaries_of(request)
        if end_of_prompt(request.num_tokens, ends, HEADER) is None:
            ends = (*ends, request.num_tokens)
        free_slots = self.tree.pool.num_unowned(64 * num_groups) // num_groups
        num_pending = min(num_pending, free_slots)
        grid = unit
        for host in self._hosts:
            host.serve(request, (layout.tokens(found.seen_len), *ends))
        if self._hosts:
            grid = max(self._hosts, key=lambda one: one.hits).grid
        prefill = Prefill(
            prompt_len=max(layout.rows(request.num_tokens) + rest - drop, 1),
            cached_len=match.cached_len,
            kv_match_len=max(found.kv_match_len - drop, match.cached_len),
            seen_len=max(found.seen_len - drop, match.cached_len),
            boundaries=tuple(max(one * WORDS // unit - drop, 0) for one in ends),
            grid=grid // unit * WORDS,
            resumed=match.resumed,
            evicted=tuple(lost),
            forks=found.forks,
            answer_survives=self.saves_answers and not request.resumable,
            free_slots=free_slots - num_pending,
            num_checkpoints=cache.num_checkpoints
            + num_pending
            + self.num_host_blocks // (num_groups + 1),
        )
        policy.on_prefill(prefill)
        wanted = policy.plan(prefill)
        if self._hosts and grid == layout.block_size:  # As simulated.
            last = prefill.seen_len, prefill.prompt_len - 1
            wanted = chain(wanted, (Placed(one, "end") for one in last))
        planned = prefill.on_grid(wanted)
        for one in lost:
            one.earlier_uses -= 1
        track.stops = {layout.tokens(one.position): one for one in planned}
        self.plan_answer(request, track)

    def note_missed(self, track: Track) -> None:
        """Notify the policy of the evicted state that an admitted request has missed. One that a
        connector brings was found: it has earned what it saves, unless a deeper one was missed."""
        if (found := track.missed) is not None and (missed := found.missed) is not None:
            loaded = self.tree.layout.rows(track.cached_len) if track.num_loaded else 0
            for one in self.tree.cache.evicted(found):
                if one.position == loaded:
                    self.policy.on_hit(one)
            if missed.position > loaded:
                num_tokens = min(found.missed_tokens, missed.position - loaded)
                self.policy.on_ghost_hit(missed, num_tokens)
        track.missed = None

    def plan_answer(self, request: Request, track: Track) -> None:
        """Plan the answer of a request, also of a preempted one, which the policy knows.

        In an overload each answer is saved, if requests ask for answers at all. What a policy hopes
        to keep then leaves the cache before its first use, so nothing that it counts ends the hope.
        """
        if self.saves_answers and not request.resumable:
            is_overload = self._has_asked and self.num_computed < self._calm_at
            interval = self.policy.decode_interval() or int(is_overload)
            track.interval = -(-interval // WORDS) * self.tree.layout.unit
        track.is_planned = True
