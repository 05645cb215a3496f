"""Entries of a board: policies that run in a process of their own, and decide there only.

The child has a cache of its own, which receives the requests one by one, each answer at its end,
and sends each decision of the entry: victims and places of checkpoints. The board's own cache
carries them out and counts the hits. So an entry cannot count its hits or read what a server does
not know yet. The board reads decisions as JSON, because unpickling runs code. On Linux with
Landlock the child can write no file, use no TCP, and neither read nor signal another process
(``confine``). Both caches are equal as long as the entry only decides; a decision that the board's
cache cannot carry out is an error.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, cast

from hybridcache.lab.rivals.evictions import make_eviction
from hybridcache.lab.runs.closed_loop import LoopRun, SessionTurn, SimulatedRequest
from hybridcache.lab.runs.grid import RERUN, RERUN_STATUS, leave_if_rerun
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import Scenario, is_own
from hybridcache.lab.traces.trace import Held, Trace, TraceRequest
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
from hybridcache.radix.tokens import EMPTY, Tokens

DONE = "done"
"""Last message of a child."""
FAILURE = "failure"
"""Name of the reason in the message of a child whose entry has failed."""
WAIT_S = 5.0
"""Time for a child to end after its last message."""
LIMIT_S = 60.0
"""Longest time for a decision."""
MAX_BYTES = 1 << 24
"""Longest message of a child."""
CONFINING = 6
"""First version of Landlock with all of ``confine``."""
UNCONFINED = "this system has no Landlock 6: an entry could keep files, or read other processes"
"""Note of a board."""
WRITES = sum(1 << right for right in (1, *range(4, 13)))
"""Landlock's rights of the first version that change files: write, remove and make."""


class RelayedRequest(TraceRequest):
    """Request of which a child gets the answer when the board's cache asks for it, at its end."""

    entry: EntryProcess

    @property
    def output(self) -> Tokens:
        answer = cast("Tokens", self[OUTPUT])
        self.entry.send((answer, self.stop_reason))
        return answer


OUTPUT = TraceRequest._fields.index("output")


@dataclass(frozen=True, slots=True)
class Relayed(Held):
    """Source of requests in memory whose prompts are sent to a child when they are read."""

    entry: EntryProcess

    def __call__(self) -> Iterator[TraceRequest]:
        for request in self.requests:
            untold = request._replace(output=EMPTY, stop_reason="", answer_tokens=None)
            self.entry.send(untold._replace(service_s=None))
            told = RelayedRequest(*request)
            told.entry = self.entry
            yield told
        self.entry.finish()


def landlock_version() -> int:
    """Return the version of Landlock of this system, or 0 without it."""
    if sys.platform != "linux":
        return 0
    return max(int(ctypes.CDLL(None).syscall(444, None, 0, 1)), 0)


def confine() -> None:
    """Take from this process, for good, the rights to change files, to use TCP, and to read or
    signal processes other than its children, as far as Landlock's version has them."""
    if not (version := landlock_version()):
        return
    libc, truncate = ctypes.CDLL(None), (version >= 3) << 14
    rights = struct.pack("QQQ", WRITES | truncate, 3, 3)
    rights = rights[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(444, rights, len(rights), 0)
    libc.prctl(38, 1, 0, 0, 0)  # No new privileges.
    if libc.syscall(446, rules, 0):
        raise OSError("Landlock refused to confine the process of an entry.")
    os.close(rules)


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
        self._orders_classes, self._has_priority_classes = map(bool, self.receive())

    def send(self, message: object) -> None:
        """Send a request. Raises PolicyError if the child has ended."""
        try:
            self._pipe.send(message)
        except OSError:
            self.receive()  # its failure
            raise PolicyError(f"{self.label}: its process ended before the last request") from None

    def receive(self) -> Any:
        """Return the next decision. Raises PolicyError if the entry has failed or takes longer than
        ``LIMIT_S``, and ChildProcessError if the child runs the user's script."""
        try:
            if not self._pipe.poll(LIMIT_S):
                raise PolicyError(f"{self.label}: no decision within {LIMIT_S:g} s")
            message = json.loads(self._pipe.recv_bytes(MAX_BYTES))
        except PolicyError:
            raise
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{self.label}: its process sent no decision ({error})") from None
        except (EOFError, OSError) as error:
            self._process.join(WAIT_S)
            if self._process.exitcode == RERUN_STATUS:
                raise ChildProcessError(RERUN) from None
            raise PolicyError(f"{self.label}: its process ended ({error!r})") from None
        if isinstance(message, dict):
            raise PolicyError(f"{message.get(FAILURE)}")
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
        """End the child, and what it has started."""
        self._pipe.close()
        self._process.join(WAIT_S)
        with suppress(OSError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
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
        item = self._held.get(serial) if type(serial) is int else None
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
        found = self._entry.receive()
        try:
            plan = [Placed(*one) for one in found]
            kinds = {tuple(map(type, one)) for one in plan}
        except TypeError:
            kinds = {()}
        if kinds - {(int, str, int)}:
            raise PolicyError(f"{self._entry.label}: its process sent no plan ({found!r:.40})")
        return plan

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

    try:
        told = trace if is_loop else replace(trace, source=Relayed(tuple(trace.in_order()), entry))
        yield told, entry.repeated(cell), entry
        if is_loop:
            entry.finish()
    finally:
        entry.close()


class RelayedLoop(LoopRun):
    """A closed loop that sends each prompt to a child when it is due, the ids of its answer when
    that begins, and each pause when it begins. The child knows the length of the answer before."""

    entry: EntryProcess

    def turn(self, number: int, place: int) -> SessionTurn:
        found = super().turn(number, place)
        text = found.text.copy()
        text[found.prompt_len :] = 0
        self.entry.send(replace(found, text=text, stop_reason=""))
        return found

    def _sample(self, request: SimulatedRequest) -> bool:
        if request.first_token_s is None:
            turn = self.sessions[request.place][request.turn]
            self.entry.send((turn.text[turn.prompt_len :], turn.stop_reason))
        return super()._sample(request)

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

    def _sample(self, request: SimulatedRequest) -> bool:
        if request.first_token_s is None:
            answer, stop_reason = self.pipe.recv()
            request.answer(answer, stop_reason)
        return super()._sample(request)

    def pause_s(self, number: int, place: int) -> float | None:
        found: float | None = self.pipe.recv()
        return found


def _decide(pipe: Connection, cell: Scenario, unit: int, num_sessions: int | None) -> None:
    """Run the cache of a child until the requests end, and send all decisions and the end."""
    os.setsid()
    confine()
    try:
        placement = cell.placement(unit)
        _tell_placement(placement, pipe)
        make = make_eviction(str(cell.policy))
        made = [make()]
        _tell(pipe, (made[0].orders_classes, made[0].has_priority_classes))

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
            while (request := pipe.recv()) is not None:
                if (served := target.begin(request)) is not None:
                    served.prefilled()
                    served.finish(*pipe.recv())
            target.counters()  # Raises the failure of a policy.
        else:
            loop = LedLoop(told, [()] * num_sessions)
            loop.pipe = pipe
            loop.run()
            if pipe.recv() is not None:
                raise PolicyError(f"{cell.label}: its process has lost a request")
        _tell(pipe, DONE)
    except (EOFError, BrokenPipeError):
        pass  # The board has stopped.
    except Exception as error:  # A user's module can raise anything.
        text = str(error) if isinstance(error, ValueError) else repr(error)
        _tell(pipe, {FAILURE: text})


def _tell(pipe: Connection, message: object) -> None:
    """Send what the board reads as JSON."""
    pipe.send_bytes(json.dumps(message).encode())


def _tell_victims(policy: EvictionPolicy, pipe: Connection) -> None:
    """Let a policy send the serial of each victim."""
    victim = policy.victim

    def tell(kind: Kind | None) -> Item | None:
        item = victim(kind)
        _tell(pipe, None if item is None else item.serial)
        return item

    policy.victim = tell  # type: ignore[method-assign]


def _tell_placement(placement: PlacementPolicy, pipe: Connection) -> None:
    """Let a placement send each plan and interval."""
    plan, decode_interval = placement.plan, placement.decode_interval

    def tell(prefill: Prefill) -> Iterable[Placed]:
        found = list(islice(plan(prefill), prefill.prompt_len))
        _tell(pipe, found)
        return found

    def tell_interval() -> int | None:
        found = decode_interval()
        _tell(pipe, found)
        return found

    placement.plan = tell  # type: ignore[method-assign]
    placement.decode_interval = tell_interval  # type: ignore[method-assign]
