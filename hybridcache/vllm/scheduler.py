"""HybridScheduler: vLLM's asynchronous scheduler, with this project's eviction and places.

The scheduler is vLLM's. Its cache manager, block pool and state managers keep their data and get
derived classes: hits come from the tree (``pool.py``), chunks end at planned positions
(``places.py``), and victims are the tree's. ``tests/vllm/test_seams.py`` lists the
overridden code.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.request import Request

from hybridcache.command.extras import version
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.protocol import Placed
from hybridcache.radix.tree import SHARED
from hybridcache.vllm import NAME, Settings, require_version, session_marks
from hybridcache.vllm.places import COPIED_BYTES, PROMPT_TOKENS, Places, Track, hint
from hybridcache.vllm.pool import (
    WORDS,
    BlockTree,
    HybridPool,
    Layout,
    Offer,
    States,
    Tables,
    derive,
)

logger = init_logger(f"vllm.{__name__}")
UNKNOWN_CONNECTORS = "LMCache", "MultiConnector", "SimpleCPU", "FlexKV"
"""Connectors that read vLLM's cache by code of their own, or whose contents nobody has checked."""


def shared_units(one: Request, other: Request) -> int:
    """Return the number of units that two prompts share. O(log prompt): hashes are chained."""
    ours, theirs = one.block_hashes, other.block_hashes
    numbers = range(min(len(ours), len(theirs)))
    return bisect_left(numbers, True, key=lambda number: ours[number] != theirs[number])


class HybridManager(KVCacheManager):
    """vLLM's cache manager with hits and states of the tree."""

    def start(self, settings: Settings, layout: Layout, saves_answers: bool) -> None:
        """Set up the fields of this class."""
        self.layout = layout
        self.states = [self.coordinator.single_type_managers[group] for group in layout.states]
        for manager in self.states:  # Planned stops replace the state inside a prefill.
            manager.has_prefill_checkpoint_blocks = False
        # The tree gives a block its keys, when hits can end in it.
        self.coordinator.cache_blocks = lambda *_: None
        pool = derive(self.block_pool, HybridPool)
        self.tree = pool.tree = BlockTree(pool, layout, settings.eviction)
        self.places = Places(parse_placement(settings.placement), self.tree, saves_answers)
        self.tracks: defaultdict[str, Track] = defaultdict(Track)
        self._prefilling: dict[str, Track] = {}
        """Running requests whose prompts are not published yet."""
        self._coming: set[bytes] = set()
        """Hashes of the states that this step computes."""
        self._admitted: list[Request] = []
        """Requests that this step admitted: their prompts are not in the tree yet."""
        self.offers: list[Offer] | None = None
        """Saved states that the connector does not know yet. None if there is no connector."""
        self.offers_answers = False
        """True if the connector takes states inside the blocks of answers."""

    # --- Lookup -----------------------------------------------------------------------------------

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        track = self.tracks[request.request_id]
        track.match, track.cached_len, track.is_waiting = None, 0, False
        if track.is_cold:
            return self.empty_kv_cache_blocks, 0, 0
        tree, num_tokens = self.tree, request.num_tokens
        if not self.prefix_cache_lookup_enabled(request):
            # All of the prompt is computed, and saved as that of a cold request.
            self._plan(request, track, *[tree.find(request, 0)[0]] * 2)
            return self.empty_kv_cache_blocks, 0, 0
        if max_cache_hit_length is not None:
            num_tokens = min(num_tokens, max_cache_hit_length + 1)
        found, match = tree.find(request, num_tokens)
        track.note(found, match, request.num_tokens, self.layout)
        track.is_waiting = self._is_early(request, match)
        self._plan(request, track, found, match)
        return self.create_kv_cache_blocks(tuple(tree.blocks_of(match))), track.cached_len, 0

    def is_early(self, request: Request) -> bool:
        """Return whether a waiting request hits deeper, or only then, in the next step."""
        is_new = request.num_computed_tokens == 0 and self.prefix_cache_lookup_enabled(request)
        if not is_new or self.tracks[request.request_id].is_cold:
            return False
        copies = self.states[0].cached_blocks_this_step
        if not copies and self._coming.isdisjoint(request.block_hashes):
            return False
        return self._is_early(request, self.tree.find(request, request.num_tokens)[1])

    def _is_early(self, request: Request, match: PrefixMatch) -> bool:
        layout, tree = self.layout, self.tree
        # A state that a copy of this step writes cannot be copied in the same step.
        copies = self.states[0].cached_blocks_this_step
        if match.resumed is not None and tree.states[match.resumed.slot][0].block_hash in copies:
            return True
        last = max((request.num_tokens - 1) // layout.unit - layout.drop, 0)
        deeper = request.block_hashes[match.cached_len // WORDS : last]
        return not self._coming.isdisjoint(deeper)

    def _plan(self, request: Request, track: Track, found: PrefixMatch, match: PrefixMatch) -> None:
        """Plan the states of a request, once, from what is known of its prompt and the match that
        it resumes from."""
        if request.num_preemptions and not track.is_planned:
            self.places.plan_answer(request, track)
        if not track.is_planned and not track.is_waiting:
            shared = max((shared_units(request, one) for one in self._admitted), default=0)
            if shared * WORDS > found.seen_len:
                found = found._replace(seen_len=shared * WORDS, forks=True)
            num_pending = sum(one.num_pending for one in self.tracks.values())
            self.places.plan(request, track, found, match, num_pending)

    def get_computed_blocks_for_connector(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_cached, shared = self.get_computed_blocks(request, max_cache_hit_length)
        track, limit = self.tracks[request.request_id], max_cache_hit_length
        rows: list[KVCacheBlock] = []
        if track.match is not None and not track.is_waiting:
            limit = request.num_tokens - 1 if limit is None else limit
            rows = self.tree.rows_of(request, limit)
        if len(rows) * self.layout.block_size <= num_cached:
            return blocks, num_cached, shared, False
        # The connector brings the state: the rows alone are a hit.
        groups: list[list[KVCacheBlock]] = [[] for _ in range(self.num_kv_cache_groups)]
        groups[self.layout.attention] = rows
        length = len(rows) * self.layout.block_size
        return self.create_kv_cache_blocks(tuple(groups)), length, 0, True

    # --- Steps ------------------------------------------------------------------------------------

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._coming.clear()
        self._admitted.clear()

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        track, start = self.tracks[request.request_id], request.num_computed_tokens
        if track.is_running:
            new = self._allocate(request, num_new_tokens, *args, **kwargs)
            is_answer = track.interval > 0 and start >= request.num_prompt_tokens
            if new is not None and is_answer and start % track.interval == 0:
                self._copy_state(request, track, start)
        else:
            new = self._admit(request, track, num_new_tokens, *args, **kwargs)
            start = track.cached_len
        end = start + num_new_tokens
        if new is not None and end in track.stops:
            self._coming.add(request.block_hashes[end // self.layout.unit - 1])
        return new

    def _allocate(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Allocate blocks. Copies of answers are given back before a request is preempted or
        waits."""
        new = super().allocate_slots(request, *args, **kwargs)
        while new is None and self._give_back_copy():
            new = super().allocate_slots(request, *args, **kwargs)
        return new

    def _admit(
        self, request: Request, track: Track, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Allocate the first blocks of a request, under a lock on its hit."""
        if track.is_waiting:
            return None
        request_id, tree, match = request.request_id, self.tree, track.match
        tree.locks[request_id] = tree.cache.lock(None if match is None else match.node)
        new = self._allocate(request, *args, **kwargs)
        if new is None:
            self.places.note_overload()
            tree.unlock(request_id)
            # A hit holds blocks beside their copies: it may need more than the prompt alone.
            pool = self.block_pool
            track.is_cold = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            if track.is_cold and track.cached_len:
                track.causes |= {"cached": 0, "refused": track.cached_len}
            return None
        track.is_running = True
        if num_loaded := kwargs.get("num_external_computed_tokens", 0):
            track.note_load(kwargs["num_new_computed_tokens"], num_loaded)
            track.is_loading = kwargs["delay_cache_blocks"]
        self.places.note_missed(track)
        self._admitted.append(request)
        self._prefilling[request_id] = track
        track.stops = {end: one for end, one in track.stops.items() if end > track.cached_len}
        # Without its lock, the match may have been evicted for the blocks of this request.
        if match is not None and request_id in tree.locks:
            tree.cache.touch(match, resumes=request.num_preemptions > 0)
        if getattr(request, "kv_cache_report_mode", "") == "full":
            self.block_pool.report_rows(request, 0, track.cached_len // self.layout.unit)
        for cause, num_tokens in track.causes.items() if not request.num_preemptions else ():
            PROMPT_TOKENS.labels(cause).inc(num_tokens)
        return new

    def step_scheduled(self, num_scheduled_tokens: dict[str, int], requests: Any) -> None:
        """Publish the prompts, as far as the step that was scheduled computes them."""
        self.places.num_computed += sum(num_scheduled_tokens.values())
        for request_id in [one for one in self._prefilling if one in num_scheduled_tokens]:
            request, track = requests[request_id], self._prefilling[request_id]
            end = min(request.num_computed_tokens, request.num_tokens)
            if end >= max(request.num_prompt_tokens, request.num_tokens - 1):
                del self._prefilling[request_id]
            tables = self.coordinator.get_blocks(request_id)
            states: States = {}
            if end in track.stops:
                states[end] = track.stops.pop(end), self._running_state(tables, end)
            stored = self._publish(request, tables, end, states)
            is_copy = request in self._admitted and not track.num_loaded
            if is_copy and track.cached_len % self.layout.block_size:
                self.tree.block_copied(request, tables, track.cached_len)
            if end in stored:
                self._keep(request_id, end, states[end][1])

    def _keep(self, request_id: str, end: int, blocks: list[KVCacheBlock]) -> None:
        """Let vLLM copy a saved state inside a block before the next step overwrites it. vLLM
        reserves the blocks."""
        if end % self.layout.block_size:
            for manager, block in zip(self.states, blocks, strict=True):
                manager._partial_hit_reqs[request_id] = end // self.layout.block_size, block

    def _running_state(self, tables: Tables, computed_len: int) -> list[KVCacheBlock]:
        """Return the blocks that hold the state after the last computed token."""
        at = (computed_len - 1) // self.layout.block_size
        return [tables[group][at] for group in self.layout.states]

    def _publish(self, request: Request, tables: Tables, end: int, states: States) -> set[int]:
        stored = self.tree.publish(request, end, tables, states)
        for at, (placed, blocks) in states.items():
            (self.places.policy.on_saved if at in stored else self.places.policy.on_dropped)(placed)
            if self.offers is not None and at in stored:
                row = tables[self.layout.attention][(at - 1) // self.layout.block_size]
                slot = self.tree.slot_of[blocks[0].block_id]
                kept = self.tree.states[slot]
                self.offers.append(Offer(request, at, placed.label in SHARED, row, slot, kept))
        return stored

    # --- Connectors -------------------------------------------------------------------------------

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish what a connector has loaded. vLLM calls this for each token of an answer too."""
        track, layout = self.tracks[request.request_id], self.layout
        if not track.is_loading:
            return
        track.is_loading = False
        states: States = {}
        tables = self.coordinator.get_blocks(request.request_id)
        end = min(num_computed_tokens, len(request.block_hashes) * layout.unit)
        end -= end % layout.unit
        blocks = self._running_state(tables, end)
        if 0 < end == num_computed_tokens and not any(
            one.is_null or one.block_hash for one in blocks
        ):
            placed, known = Placed(layout.rows(end), "preempt"), self.tree.find(request, end + 1)[0]
            if (lost := known.missed) is not None and lost.position == placed.position:
                placed = placed._replace(label=lost.label, distance=lost.distance)
            states[end] = placed, blocks
        # No rule of the placement saves this state now, and the connector has it.
        if end in self.tree.publish(request, end, tables, states):
            self._keep(request.request_id, end, blocks)

    def take_boundary_state_offloads(self) -> dict[str, list[tuple[int, int, int]]]:
        """Return the blocks and positions of saved states for the connector, by request.

        A state that the next step moves to a copy is held back until then. One that is for the next
        turn alone is held back until its request ends, and given up for a deeper one: both tiers
        give up superseded states first. While no answer can be copied, none is held back: the
        deeper one may never come, and the device is about to evict this one. Of the states inside
        blocks, a connector takes one per request and step.
        """
        super().take_boundary_state_offloads()
        found: dict[str, list[tuple[int, int, int]]] = {}
        partial: dict[str, Offer] = {}
        offers, self.offers = self.offers or [], [] if self.offers is not None else None
        by_depth = sorted(offers, key=lambda one: one.position)
        deepest = {one.request.request_id: one.position for one in by_depth}
        for one in reversed(offers):
            request, layout, blocks = one.request, self.layout, self.tree.states.get(one.slot)
            request_id = request.request_id
            is_superseded = not one.is_shared and one.position < deepest[request_id]
            if blocks is not one.blocks or (is_superseded and request.is_finished()):
                continue  # Evicted, or given up.
            track = self.tracks.get(request_id)
            has_next = track is not None and (track.stops or track.interval) and self._can_copy()
            if self.offers is not None and has_next and not one.is_shared:
                self.offers.append(one)
                continue
            if one.position % layout.block_size == 0:
                found.setdefault(request_id, []).extend(one.entries(layout))
                continue
            moving = self.states[0]._partial_hit_reqs.get(request_id, (0, None))[1]
            if moving is blocks[0] or request_id in partial:
                if self.offers is not None and not request.is_finished():
                    self.offers.append(one)
                continue
            table = self.coordinator.get_blocks(request_id)[layout.attention]
            span = one.position // layout.block_size
            is_held = span < len(table) and table[span] is one.row
            is_prompt = one.position <= request.num_prompt_tokens
            # The rows may be in a block of another request, and this one's be free.
            if (is_held or self.tree.num_units[one.row.block_id]) and (
                is_prompt or self.offers_answers
            ):
                partial[request_id] = one
        for request_id, one in partial.items():
            found.setdefault(request_id, []).extend(one.entries(self.layout))
        return found

    # --- Answers ----------------------------------------------------------------------------------

    def _copy_state(self, request: Request, track: Track, start: int) -> None:
        """Let this step copy the state after ``start`` tokens before it computes.

        Only the last copy is kept, in blocks of the request's own, which are published when the
        answer ends. So a stop token needs no notice, and asynchronous steps may run ahead.
        """
        pool, tables = self.block_pool, self.coordinator.get_blocks(request.request_id)
        sources = self._running_state(tables, start)
        if any(block.is_null for block in sources) or not (track.copy or self._can_copy()):
            return
        track.copy = track.copy or pool.get_new_blocks(len(sources))
        track.copied_len = start
        for manager, source, block in zip(self.states, sources, track.copy, strict=True):
            manager._pending_cow_copies.append((source, block))
            source.ref_cnt += 1
            block.ref_cnt += 1
        COPIED_BYTES.inc(self.layout.block_bytes * len(sources))

    def _can_copy(self) -> bool:
        """Return whether a state can be copied. Each running request keeps a block, so that no copy
        preempts one."""
        return self.block_pool.get_num_free_blocks() >= len(self.states) + len(self.tracks)

    def _give_back_copy(self) -> bool:
        """Free the copy of the newest answer. Returns False if there is none."""
        for track in reversed(self.tracks.values()):
            if track.copy:
                self.block_pool.free_blocks(track.copy)
                track.copy, track.interval = [], 0
                return True
        return False

    # --- Ends -------------------------------------------------------------------------------------

    def free(self, request: Request) -> None:
        self._end(request)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        # A step in flight may still write these blocks.
        self._end(request)
        return super().pop_blocks_for_free(request)

    def _end(self, request: Request) -> None:
        """Publish the computed tokens of a request that ended or is preempted."""
        track = self.tracks.pop(request.request_id, None)
        if track is None or not track.is_running:
            return
        request_id, layout = request.request_id, self.layout
        tables = self.coordinator.get_blocks(request_id)
        self._prefilling.pop(request_id, None)
        end = computed = request.num_computed_tokens
        if not self.places.saves_answers:  # Drafts in flight may be rejected.
            end = min(end - request.num_in_flight_tokens, request.num_tokens - 1)
        end = min(end, request.num_tokens, len(request.block_hashes) * layout.unit)
        if track.is_loading:  # It was aborted, or the load has failed.
            end = 0
        states: States = {}
        if track.copy and track.copied_len <= end:
            states[track.copied_len] = Placed(layout.rows(track.copied_len), "decode"), track.copy
        if self.places.saves_answers and computed == end and end % layout.unit == 0 < end:
            blocks = self._running_state(tables, end)
            if end > track.cached_len and not any(one.is_null or one.block_hash for one in blocks):
                label = "preempt" if end <= request.num_prompt_tokens else "decode"
                states[end] = track.stops.pop(end, Placed(layout.rows(end), label)), blocks
        self._publish(request, tables, end, states)
        if not request.is_finished():
            self.places.note_overload()
        else:
            given = request.sampling_params and request.sampling_params.extra_args
            marks = session_marks(given or {}, request.cache_salt)
            self.tree.cache.label_tip(self.tree.locks[request_id].node, *marks)
        for placed in track.stops.values():
            self.places.policy.on_dropped(placed)
        self.tree.unlock(request_id)
        self.block_pool.free_blocks(track.copy)

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self.tree.cache.reset()
        return True


class HybridScheduler(AsyncScheduler):
    """Scheduler for ``--scheduler-cls hybridcache.vllm.HybridScheduler``."""

    def __new__(cls, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Return vLLM's own scheduler for a model without linear layers."""
        require_version(vllm.__version__)
        Settings.read(vllm_config.additional_config)
        if not kv_cache_config.has_mamba_layers:
            return AsyncScheduler(vllm_config, kv_cache_config, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = Settings.read(self.vllm_config.additional_config)
        # Planned stops replace the one at the end of the prompt.
        self.mamba_partial_cache_hit = False
        layout, manager = self._layout(), derive(self.kv_cache_manager, HybridManager)
        # With drafts, the block with the state of the last accepted token is not known.
        manager.start(settings, layout, saves_answers=not self.num_spec_tokens)
        if self.connector is not None:
            manager.offers = []
            manager.offers_answers = getattr(self.connector, "takes_answers", False)
            manager.places.use_host(getattr(self.connector, "num_host_blocks", 0))
        # Time is counted in steps: no decision depends on a clock or a rank.
        manager.tree.cache.policy.set_clock(lambda: self.current_step * 0.05)
        logger.info(
            "hybridcache %s: eviction %s, placement %s; hits end at multiples of %d tokens, a "
            "block has %d tokens, a state takes %d blocks (%.1f MB).",
            *(version(), *settings, layout.unit, layout.block_size),
            *(len(layout.states), layout.block_bytes * len(layout.states) / 1e6),
        )
        if layout.unit == layout.block_size:
            logger.warning(
                "hybridcache: hits end at blocks of %d tokens. Set --prefix-match-unit, for "
                "example to 32, for more of them.",
                layout.block_size,
            )

    def _layout(self) -> Layout:
        """Return the layout of the model's blocks. Raises ValueError for what is not supported."""
        manager, groups = self.kv_cache_manager, self.kv_cache_config.kv_cache_groups
        managers = manager.coordinator.single_type_managers
        states = [i for i, one in enumerate(managers) if type(one) is MambaManager]
        attention = [i for i, one in enumerate(managers) if type(one) is FullAttentionManager]
        names = ", ".join(type(one).__name__ for one in managers)
        refused = {
            "--no-enable-prefix-caching": not manager.enable_caching,
            f"the connector {type(self.connector).__name__} (--kv-transfer-config)": (
                self.connector is not None
                and type(self.connector).__name__.startswith(UNKNOWN_CONNECTORS)
            ),
            "context parallelism (attention blocks become longer than those of states)": (
                self.dcp_world_size * self.pcp_world_size > 1
            ),
            "drafts of several MTP modules": self.num_prefill_lookahead > 1,
            f"the cache groups of this model ({names})": len(attention) != 1
            or len(states) != len(managers) - 1,
            "groups with blocks of different sizes": len({one.block_size for one in managers}) > 1,
        }
        for what in [one for one, is_set in refused.items() if is_set]:
            raise ValueError(f"hybridcache does not support {what}: drop it, or --scheduler-cls.")
        has_parts = manager.coordinator.enable_partial_hash_hits
        unit = self.hash_block_size if has_parts else self.block_size
        size = len(groups[0].layer_names) * groups[0].kv_cache_spec.page_size_bytes
        drop = int(self.use_eagle_block_drop)
        return Layout(unit, self.block_size, size, drop, attention[0], tuple(states))

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # A request that is skipped here lets those behind it pass, and is the first of the next
        # step.
        is_ready = super()._handle_blocked_waiting_request(request)
        return is_ready and not self.kv_cache_manager.is_early(request)

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, *num_new_computed_tokens: int
    ) -> int:
        block_size = self.block_size
        start = request.num_computed_tokens + sum(num_new_computed_tokens)
        prefill_end = max(request.num_prompt_tokens, request.num_tokens - 1)
        if start >= prefill_end:
            return num_new_tokens
        end = start + num_new_tokens
        if end < prefill_end:
            # As in vLLM: a chunk before the last ends at a block, unless a block is wider.
            threshold = self.scheduler_config.long_prefill_token_threshold
            limit = min(self.max_num_scheduled_tokens, threshold or self.max_num_scheduled_tokens)
            aligned = end // block_size * block_size
            if aligned > start or block_size <= limit:
                end = aligned
        stops = self.kv_cache_manager.tracks[request.request_id].stops
        return max(min((stop for stop in stops if start < stop < end), default=end) - start, 0)

    def _connector_finished(self, request: Request) -> Any:
        track = self.kv_cache_manager.tracks.get(request.request_id)
        delay, params = super()._connector_finished(request)
        if track is not None and hint(request, "explain"):
            params = (params or {}) | {NAME: track.causes}
        return delay, params

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        self.kv_cache_manager.step_scheduled(scheduler_output.num_scheduled_tokens, self.requests)
