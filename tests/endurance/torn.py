"""Calls that are torn at random places: at a line, after a call in C inside a line, where Python
handles signals, by one allocation that fails, or by a burst of them.

Half of the calls are steps and transfers, with tiers or between two engines, and half are the other
public calls. Places are spread evenly over the source lines that a call executes. Others follow in
the repair. Afterwards every invariant holds, and no answer is lost, repeated or different.
"""

from __future__ import annotations

import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from engine.errors import DuplicateId
from tests.faults import test_torn_steps as steps
from tests.faults import test_torn_transfers as transfers

PATIENCE_S = 120
"""Time after which a try hangs."""
KINDS = ("line", "interrupt", "allocation", "burst")
STARVED = KINDS[2:]


def made(rng: random.Random, is_starved: bool) -> tuple[Any, str, Callable[[], object]]:
    """Return (a service in the middle of its work, name of a call, the call)."""
    is_pair = rng.random() < 0.25
    if is_pair:
        service: Any = transfers.Pair(rng.choice(transfers.NAMES))
    else:  # Rust ends a process without memory, and answers with text use its libraries.
        names = [name for name in steps.SETTINGS if name != "text" or not is_starved]
        service = steps.Service(rng.choice(names))
    service.submit_some()
    for _ in range(rng.randrange(40)):
        for side in service.sides:
            service.turn(side)
    if rng.random() < 0.5:
        return service, "step", partial(service.step, rng.choice(service.sides))
    calls: dict[str, Any] = transfers.PAIR_CALLS if is_pair else steps.CALLS
    name = rng.choice(sorted(calls))
    return service, name, partial(calls[name], service)


def tear(seed: int, kind: str, patch: pytest.MonkeyPatch) -> str:
    """Make one try. Returns the torn call, or "" if nothing was raised. Raises AssertionError for a
    damage."""
    rng, is_starved = random.Random(seed), kind in STARVED
    transfers.make_small_pieces(patch)
    if is_starved:
        most = 1 if kind == "allocation" else int(2 ** rng.uniform(1, 8))
        tracer: steps.Raise = steps.Starve(int(2 ** rng.uniform(0, 11)), most)
    else:
        tracer = steps.Raise() if kind == "line" else steps.Interrupt()
        service, name, call = made(random.Random(seed), is_starved)
        service.take(tracer.run(call))
        service.close()
        if not tracer.places:
            return ""
        [tracer.at], tracer.places = steps.spread(tracer.places, 1, rng), []
        tracer.error = rng.choice((MemoryError, KeyboardInterrupt))
    service, name, call = made(random.Random(seed), is_starved)
    # After a second exception, a request that nothing reads any more may be left.
    has_more = not is_starved and name not in ("generate", "stream")
    again = steps.Again(patch, [int(2 ** rng.uniform(0, 9))] * rng.choice((0, 0, 1, 2)) * has_more)
    is_torn = False
    try:
        service.take(tracer.run(call))
    except (Exception, KeyboardInterrupt) as error:
        is_torn = True
        # A library in C may answer a lack of memory with any error.
        if not (is_starved or isinstance(error, tracer.error | MemoryError | DuplicateId)):
            raise
    for _ in range(4):
        transfers.take_outputs(service)
    again.lines.clear()
    if is_torn and name != "step":
        with suppress(DuplicateId):
            service.take(call())
    if name == "close":
        assert not [*service.engine.requests] and not any(service.engine._manager.held())
        service.close()
    else:
        steps.check_service(service)
    return f"{kind} {name}" if is_torn or again.num_raised else ""


def tear_apart(seed: int, kind: str) -> str:
    """Make one try in a process of its own. Raises AssertionError for a damage or a crash."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        signal.alarm(PATIENCE_S)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.MonkeyPatch.context() as patch:
                said = tear(seed, kind, patch)
        except BaseException:
            said = f"DAMAGE {traceback.format_exc()[-3000:]}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert not status and not said.startswith("DAMAGE"), f"seed {seed}, {status=}: {said}"
    return said


def run(seed: int, num_tries: int, only: str = "") -> dict[str, Any]:
    """Tear ``num_tries`` calls, of one kind with ``only``. Returns their number by kind."""
    found = Counter[str]()
    for number in range(seed, seed + 50 * num_tries):
        if found.total() - found[""] >= num_tries:
            break
        found[tear_apart(number, only or KINDS[number % 4])] += 1
    return dict(found)
