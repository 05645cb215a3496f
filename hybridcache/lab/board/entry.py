"""Entries of a board: policies that run in a process of their own, and decide there only.

The child has a cache of its own, which receives the requests one by one, and sends each decision of
the entry: victims and places of checkpoints. The board's own cache carries them out and counts the
hits. So an entry cannot count its hits, read later requests, or keep anything between two memories:
each has a new process. Both caches are equal as long as the entry only decides; a decision that the
board's cache cannot carry out is an error.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from hybridcache.lab.rivals.evictions import make_eviction
from hybridcache.lab.runs.closed_loop import LoopRun, SessionTurn
from hybridcache.lab.runs.grid import RERUN, RERUN_STATUS, leave_if_rerun
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import Scenario, is_own
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.policies.user import OwnPolicy
from hybridcache.radix.protocol import (
    EvictionPolicy,
    Item,
    Kind,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
)

DONE = "done"
"""Last message of a child."""
WAIT_S = 5.0
"""Time for a child to end after its last message."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Message of a child whose entry has failed."""

    text: str


# --- The board's side -----------------------------------------------------------------------------


class EntryProcess:
    """The board's end of a child that runs the policies of one cell."""

    def __init__(self, cell: Scenario, unit: int, num_sessions: int | None) -> None:
        """Start the child. ``num_sessions`` is that of a closed loop, or None for a replay."""
        leave_if_rerun()
        self.label = cell.label
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # A child takes milliseconds to start.
        self._pipe, far = context.Pipe()
        asked = (far, replace(cell, trace="unknown"), unit, num_sessions)
        self._process = context.Process(target=_decide, args=asked, daemon=True)
        self._process.start()
        far.close()
        self._orders_classes, self._has_priority_classes = self.receive()

    def send(self, message: object) -> None:
        """Send a request. Raises PolicyError if the child has ended."""
        try:
            self._pipe.send(message)
        except OSError:
            self.receive()  # its failure
            raise PolicyError(f"{self.label}: its process ended before the last request") from None

    def receive(self) -> Any:
        """Return the next decision. Raises PolicyError if the entry has failed, and
        ChildProcessError if the child runs the user's script."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(WAIT_S)
            if self._process.exitcode == RERUN_STATUS:
                raise ChildProcessError(RERUN) from None
            raise PolicyError(f"{self.label}: its process ended ({error!r})") from None
        if isinstance(message, Failure):
            raise PolicyError(message.text)
        return message

    def eviction(self) -> EvictionPolicy:
        """Return the policy of the board's cache, which repeats the victims of the child's."""
        policy = RepeatedEviction(self)
        policy.orders_classes = self._orders_classes
        policy.has_priority_classes = self._has_priority_classes
        return policy

    def placement(self) -> PlacementPolicy:
        """Return the placement of the board's cache, which repeats the child's."""
        return RepeatedPlacement(self)

    def repeated(self, cell: Scenario) -> Scenario:
        """Return ``cell`` with policies that repeat the decisions of the child."""
        eviction = OwnPolicy(str(cell.policy), self.eviction)
        return replace(
            cell, policy=eviction, checkpoints=OwnPolicy(str(cell.checkpoints), self.placement)
        )

    def finish(self) -> None:
        """Wait for the last message. Raises PolicyError if the entry has failed."""
        self.send(None)
        if (message := self.receive()) != DONE:
            raise PolicyError(f"{self.label}: its process made a further decision: {message!r:.80}")

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(WAIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class RepeatedEviction(EvictionPolicy):
    """Eviction by the victims that a child sends, by their serials."""

    def __init__(self, entry: EntryProcess) -> None:
        self._entry, self._held = entry, dict[int, Item]()

    def add(self, item: Item) -> None:
        self._held[item.serial] = item

    def discard(self, item: Item, evicted: bool) -> None:
        del self._held[item.serial]

    def candidates(self) -> Iterable[Item]:
        return self._held.values()

    def victim(self, kind: Kind | None) -> Item | None:
        serial = self._entry.receive()
        if serial is None:
            return None
        item = self._held.get(serial) if isinstance(serial, int) else None
        if item is None or (kind is not None and item.kind != kind):
            raise PolicyError(
                f"{self._entry.label}: its process evicted {serial!r:.40}, which is no candidate "
                "of the board's cache: an entry may only decide, and not change the cache"
            )
        return item


class RepeatedPlacement(PlacementPolicy):
    """Placement by the decisions that a child sends."""

    def __init__(self, entry: EntryProcess) -> None:
        self._entry = entry

    def plan(self, prefill: Prefill) -> Sequence[Placed]:
        found: Sequence[Placed] = self._entry.receive()
        if not isinstance(found, list) or not all(type(one) is Placed for one in found):
            raise PolicyError(f"{self._entry.label}: its process sent no plan ({found!r:.40})")
        return found

    def decode_interval(self) -> int | None:
        found = self._entry.receive()
        if found is not None and (type(found) is not int or found < 1):
            raise PolicyError(f"{self._entry.label}: its process sent no interval ({found!r:.40})")
        return found


@contextmanager
def entered(
    trace: Trace, cell: Scenario, num_sessions: int | None = None
) -> Iterator[tuple[Trace, Scenario, EntryProcess | None]]:
    """Yield a trace and a cell for a run. If a policy of the cell is not built in, its child gets
    each request when the trace is read, and the cell repeats its decisions."""
    if cell.baseline or not (is_own(cell.policy) or is_own(cell.checkpoints)):
        yield trace, cell, None
        return
    is_loop = num_sessions is not None
    entry = EntryProcess(cell, 1 if is_loop else trace.unit, num_sessions)

    def relayed() -> Iterator[TraceRequest]:
        for request in trace.in_order():
            entry.send(request)
            yield request
        entry.finish()

    try:
        told = trace if is_loop else replace(trace, source=relayed)
        yield told, entry.repeated(cell), entry
        if is_loop:
            entry.finish()
    finally:
        entry.close()


class RelayedLoop(LoopRun):
    """A closed loop that sends each request to a child when it is due, and each pause when it
    begins."""

    entry: EntryProcess

    def turn(self, number: int, place: int) -> SessionTurn:
        found = super().turn(number, place)
        self.entry.send(found)
        return found

    def pause_s(self, number: int, place: int) -> float | None:
        found = super().pause_s(number, place)
        self.entry.send(found)
        return found


# --- The child's side -----------------------------------------------------------------------------


class LedLoop(LoopRun):
    """A closed loop whose sessions are in another process."""

    pipe: Connection

    def turn(self, number: int, place: int) -> SessionTurn:
        found: SessionTurn = self.pipe.recv()
        return found

    def pause_s(self, number: int, place: int) -> float | None:
        found: float | None = self.pipe.recv()
        return found


def _decide(pipe: Connection, cell: Scenario, unit: int, num_sessions: int | None) -> None:
    """Run the cache of a child until the requests end, and send all decisions and the end."""
    try:
        placement = cell.placement(unit)
        _tell_placement(placement, pipe)
        make = make_eviction(str(cell.policy))
        made = [make()]
        pipe.send((made[0].orders_classes, made[0].has_priority_classes))

        def eviction() -> EvictionPolicy:
            policy = made.pop() if made else make()
            _tell_victims(policy, pipe)
            return policy

        told = replace(
            cell,
            policy=OwnPolicy(str(cell.policy), eviction),
            checkpoints=OwnPolicy(str(cell.checkpoints), lambda: placement),
        )
        if num_sessions is None:
            target = build_target(told, unit)
            serve(target, iter(pipe.recv, None), unit, told)
            target.counters()  # Raises the failure of a policy.
        else:
            loop = LedLoop(told, [()] * num_sessions)
            loop.pipe = pipe
            loop.run()
            if pipe.recv() is not None:
                raise PolicyError(f"{cell.label}: its process has lost a request")
        pipe.send(DONE)
    except (EOFError, BrokenPipeError):
        pass  # The board has stopped.
    except Exception as error:  # A user's module can raise anything.
        text = str(error) if isinstance(error, ValueError) else repr(error)
        pipe.send(Failure(text))


def _tell_victims(policy: EvictionPolicy, pipe: Connection) -> None:
    """Let a policy send the serial of each victim."""
    victim = policy.victim

    def tell(kind: Kind | None) -> Item | None:
        item = victim(kind)
        pipe.send(None if item is None else item.serial)
        return item

    policy.victim = tell  # type: ignore[method-assign]


def _tell_placement(placement: PlacementPolicy, pipe: Connection) -> None:
    """Let a placement send each plan and interval."""
    plan, decode_interval = placement.plan, placement.decode_interval

    def tell(prefill: Prefill) -> Iterable[Placed]:
        found = list(islice(plan(prefill), prefill.prompt_len))
        pipe.send(found)
        return found

    def tell_interval() -> int | None:
        found = decode_interval()
        pipe.send(found)
        return found

    placement.plan = tell  # type: ignore[method-assign]
    placement.decode_interval = tell_interval  # type: ignore[method-assign]
