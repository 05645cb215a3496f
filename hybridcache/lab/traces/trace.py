"""A trace: the requests a cache would see, in the order it would see them, read or generated
lazily.

One id of a request stands for ``unit`` tokens: 1 for texts and generators, 64 or 512 for published
traces that reveal only the hashes of blocks. A cache that replays such a trace runs in units: its
bytes per KV row are multiplied by ``unit``.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridcache.geometry.units import counted
from hybridcache.radix.lease import STOP_REASONS
from hybridcache.radix.tokens import Tokens, immutable, require_index


class TraceRequest(NamedTuple):
    """One request, prompt and answer, in ids of ``Trace.unit`` tokens each."""

    timestamp_s: float
    """Arrival, seconds from the start of the trace."""
    session: Hashable
    """Conversation or agent run that the request belongs to. Requests of one session never overlap
    in time."""
    namespace: Hashable
    """Requests in different namespaces never share (model, adapter, tenant)."""
    tokens: Tokens
    """The prompt, int32[n]."""
    output: Tokens
    """The answer, int32[m]; ids that no prompt repeats if the source does not have them."""
    boundaries: tuple[int, ...] = ()
    """Positions (in ids) known to survive into later prompts: end of the system segment, last
    stable boundary. A trace sorts them."""
    partial_tokens: int | None = None
    """Tokens that the prompt's last id stands for, or None if it is a whole unit."""
    answer_survives: bool = True
    """False if later prompts are known to diverge before the end of this one."""
    answer_tokens: int | None = None
    """Tokens of the answer, or None if its ids determine the number. Its first tokens may fill the
    prompt's last id, and its last ones only a part of an id."""
    service_s: float | None = None
    """Seconds from the timestamp until the answer was complete, as recorded; None if unknown. The
    rest of the time until the session's next request is its pause: all of it if unknown."""
    stop_reason: str = ""
    """Reason why the answer ended, one of ``STOP_REASONS`` of a lease ("session_end" if no further
    turn will come); empty if it is not known."""
    returns_within_s: float | None = None
    """Promise of the client, true or not, to send the session's next request within this time after
    the answer; None without a promise."""

    def num_tokens(self, unit: int) -> int:
        """Return the length of the prompt in tokens."""
        whole = len(self.tokens) * unit
        return whole if self.partial_tokens is None else whole - unit + self.partial_tokens

    def num_answer_tokens(self, unit: int) -> int:
        """Return the length of the answer in tokens."""
        return len(self.output) * unit if self.answer_tokens is None else self.answer_tokens


class Tabular:
    """Result with rows for a table."""

    __slots__ = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a flat dictionary per row."""
        raise NotImplementedError

    def _repr_html_(self) -> str | None:
        """Return the table for a notebook; None if the result has none."""
        table = getattr(self, "table", None)
        return None if table is None else f"<pre>{escape(table())}</pre>"

    def to_frame(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``. ModuleNotFoundError without pandas, which this
        project does not install."""
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            reason = "to_frame needs pandas: pip install pandas, or call to_dicts"
            raise ModuleNotFoundError(reason, name=error.name) from error
        return pandas.DataFrame(self.to_dicts())


@dataclass(frozen=True, slots=True)
class Trace(Tabular):
    """Requests that can be iterated again and again; each time the same."""

    name: str
    unit: int
    """Tokens that one id stands for."""
    source: Callable[[], Iterable[TraceRequest]]
    """Function that returns all requests from the first on, in order of their timestamps.
    Picklable, so that processes can share a trace by recipe."""
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    """Records that were skipped in the latest iteration."""
    counted_by: str = ""
    """Tokenizer of a trace of texts: its name, the path of its file, or the header of a recorded
    trace. Empty for traces of ids."""
    recipe: str = ""
    """Specification with options and seed, as ``open_trace`` takes it; empty if there is none."""
    arrivals: str = ""
    """Arrivals that are drawn because the file has none; empty if times are recorded or
    generated."""
    columns: str = ""
    """Columns of a CSV file that are read for each field, and the unused ones."""
    times: str = ""
    """Unit of the times in its file, and the reason for it; empty if it has none."""
    limits: str = ""
    """Sentence on reuse that its format cannot show; empty if there is none."""

    def __post_init__(self) -> None:
        require_index(self.unit, f"{self.name}: unit, the tokens of an id,", 1)

    @property
    def full_name(self) -> str:
        """Recipe, or the name if it has none."""
        return self.recipe or self.name

    @property
    def path(self) -> Path | None:
        """File from which it is read; None if it is generated or held."""
        source = self.source.source if isinstance(self.source, _Head) else self.source
        return getattr(source, "path", None)

    @property
    def notes(self) -> list[str]:
        """Notes under tables: the tokenizer, limits of the format, and drawn arrivals."""
        notes = [f"tokens counted by: {self.counted_by}"] if self.counted_by else []
        notes += filter(None, [self.limits])
        notes += [f"arrivals: {self.arrivals} (?seed=1 draws others)"] if self.arrivals else []
        return notes

    @property
    def is_empty_because(self) -> str:
        """Sentence for an error if the latest iteration gave no request."""
        bad = self.bad
        because = f": all {bad.count} records are bad (the first: {bad.first})" if bad.count else ""
        return f"there is no request in it{because}"

    def __iter__(self) -> Iterator[TraceRequest]:
        """Start over. Iteration raises ValueError for an invalid request."""
        if isinstance(self.source, Held):
            return self.source()
        self.bad.start()
        return self._checked(self.source())

    def _checked(self, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
        for number, request in enumerate(requests, 1):
            try:
                yield checked(request, self.unit)
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{self.name}, request {number}: {error}") from None

    def in_order(self) -> Iterator[TraceRequest]:
        """Yield the requests. Raises ValueError for one that is earlier than the one before it."""
        before_s = 0.0
        for number, request in enumerate(self, 1):
            if request.timestamp_s < before_s:
                raise ValueError(
                    f"{self.name}, request {number}: timestamp_s {request.timestamp_s:g} is before "
                    f"{before_s:g}, that of the request before it: sort the requests by time"
                )
            before_s = request.timestamp_s
            yield request

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary per request: its session, namespace, time, and tokens."""
        names = "session", "namespace", "arrival_s", "prompt_tokens", "answer_tokens"
        rows = ((one, one.num_tokens(self.unit), one.num_answer_tokens(self.unit)) for one in self)
        facts = ((one.session, one.namespace, one.timestamp_s, *tokens) for one, *tokens in rows)
        return [dict(zip(names, values, strict=True)) for values in facts]

    def head(self, num_requests: int) -> Trace:
        """Return the trace of its first requests. ValueError for a number below 0."""
        require_index(num_requests, "num_requests", 0)
        source, name = self.source, self.full_name
        if isinstance(source, _Head):  # a recipe has one head, the last of its options
            num_requests, source = min(num_requests, source.num_requests), source.source
            name = name[: name.rindex("head=") - 1]
        recipe = f"{name}{'&' if '?' in name else '?'}head={num_requests}"
        return replace(self, source=_Head(source, num_requests), recipe=recipe)

    def kept(self, most_bytes: float = math.inf) -> Trace:
        """Return the same trace with all requests held in memory, for many replays; unchanged if
        their ids take more than ``most_bytes``."""
        held: list[TraceRequest] = []
        num_bytes = 0
        for request in self:
            # A lease copies other ids, once per replay.
            held.append(request._replace(tokens=immutable(request.tokens)))
            num_bytes += request.tokens.nbytes + request.output.nbytes
            if num_bytes > most_bytes:
                return self
        return replace(self, source=Held(tuple(held)))


@dataclass(frozen=True, slots=True)
class Held:
    """Source of requests in memory, which were checked when they were read."""

    requests: tuple[TraceRequest, ...]

    def __call__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)


def checked(request: TraceRequest, unit: int) -> TraceRequest:
    """Return ``request`` with its ids as int32[n] and ascending boundaries. Raises ValueError or
    TypeError if it is invalid. O(n)."""
    now_s = request.timestamp_s
    if not isinstance(now_s, float | int | np.number) or not 0 <= now_s < math.inf:
        raise ValueError(f"timestamp_s must be a finite number of at least 0 (got {now_s!r})")
    tokens, output = as_ids(request.tokens, "tokens"), as_ids(request.output, "output")
    boundaries = tuple(sorted(as_ids(request.boundaries, "boundaries").tolist()))
    if not len(tokens):
        raise ValueError("tokens are empty")
    if boundaries and boundaries[-1] > len(tokens):
        raise ValueError(f"boundaries must be at most {len(tokens)} here (got {boundaries[-1]})")
    limits: tuple[tuple[str, Any, float, float], ...] = (
        ("partial_tokens", Integral, 1, unit),
        ("answer_tokens", Integral, 0, 1 << 31),
        ("service_s", Real, 0, 1e99),
        ("returns_within_s", Real, 0, 1e99),
    )
    for name, kind, least, most in limits:
        value = getattr(request, name)
        if value is not None and not (isinstance(value, kind) and least <= value <= most):
            number = "a whole number" if kind is Integral else "a number"
            raise ValueError(f"{name} must be {number} from {least} to {most} (got {value!r})")
    if unit == 1 and len(output) and request.answer_tokens not in (None, len(output)):
        raise ValueError(
            f"answer_tokens must be the number of ids in output, {len(output)}, as a unit is one "
            f"token (got {request.answer_tokens})"
        )
    if request.stop_reason and request.stop_reason not in STOP_REASONS:
        known = ", ".join(sorted(STOP_REASONS))
        raise ValueError(f"stop_reason must be one of {known} (got {request.stop_reason!r})")
    return request._replace(tokens=tokens, output=output, boundaries=boundaries)


def as_ids(given: object, name: str) -> Tokens:
    """Return a list or an array of whole numbers in [0, 2**31) as int32[n], unchanged if it is
    that. Raises ValueError, which begins with ``name``, for another value. O(n)."""
    with suppress(ValueError):  # of nested lists of several lengths
        ids = np.asarray(given)
        if ids.ndim == 1 and not ids.size:
            return np.zeros(0, np.int32)
        is_whole = ids.ndim == 1 and ids.dtype.kind in "iu" and ids.min() >= 0
        has_bools = isinstance(given, list) and bool in set(map(type, given))
        if is_whole and not has_bools and not int(ids.max()) >> 31:
            return ids.astype(np.int32, copy=False)
    raise ValueError(
        f"{name} must be int32[n], or a list of whole numbers in [0, 2**31) (got {given!r:.40})"
    )


@dataclass(frozen=True, slots=True)
class _Head:
    source: Callable[[], Iterable[TraceRequest]]
    num_requests: int

    def __call__(self) -> Iterator[TraceRequest]:
        return islice(self.source(), self.num_requests)


class BadRecordError(ValueError):
    """A record that cannot be read, named by file and line in one sentence."""


@dataclass(slots=True)
class BadRecords:
    """Rule of a reader for invalid records: stop, or skip and count."""

    skip: bool
    count: int = 0
    first: str = ""
    """Error of the first one that was skipped: file, line and cause."""

    def __reduce__(self) -> tuple[type[BadRecords], tuple[bool]]:
        """Pickle the rule alone: the counts of an iteration do not identify a trace."""
        return BadRecords, (self.skip,)

    def start(self) -> None:
        """Forget the records of an earlier pass."""
        self.count, self.first = 0, ""

    def report(self, path: object, line: int | str, problem: str) -> None:
        """Raise BadRecordError, or count."""
        message = f"{path}, line {line}: {problem}"
        if not self.skip:
            raise BadRecordError(message)
        self.count, self.first = self.count + 1, self.first or message

    def left_out(self) -> str:
        """Return the number of skipped records, and the error of the first one."""
        first = f" (the first: {self.first})" if self.first else ""
        return f"{counted(self.count, 'bad record')} left out{first}"


def by_session(requests: Iterable[TraceRequest]) -> list[list[TraceRequest]]:
    """Return the requests of each session, in the order of the first requests."""
    found: dict[Hashable, list[TraceRequest]] = {}
    for request in requests:
        found.setdefault(request.session, []).append(request)
    return [*found.values()]


def plain_name(name: Hashable) -> str | int:
    """Return a session or namespace as the readers of files accept it."""
    return name if isinstance(name, int | str) and not isinstance(name, bool) else str(name)


def distinct(name: str, taken: Counter[str]) -> str:
    """Return the name of a new session: ``name``, with a number if another session has it."""
    taken[name] += 1
    return name if taken[name] == 1 else distinct(f"{name} ({taken[name]})", taken)


class FreshIds:
    """Source of ids that no prompt contains, for answers without known tokens: they count down from
    2**31 - 1. Ids of a trace stay below ``FLOOR``."""

    FLOOR = 1 << 30

    def __init__(self) -> None:
        self._next = (1 << 31) - 1

    def take(self, num_ids: int) -> Tokens:
        """Return int32[num_ids], never taken before. OverflowError when all are taken."""
        if self._next - num_ids < self.FLOOR:
            raise OverflowError("more than 2**30 unknown answer ids in one trace")
        self._next -= num_ids
        return np.arange(self._next + 1, self._next + 1 + num_ids, dtype=np.int32)


class KnownIds:
    """Source of ids below ``FreshIds.FLOOR``, which prompts may repeat."""

    def __init__(self) -> None:
        self._next = 0

    def reserve(self, num_ids: int) -> int:
        """Return the first of ``num_ids`` new ids. OverflowError when all are taken."""
        if self._next + num_ids > FreshIds.FLOOR:
            raise OverflowError("more than 2**30 ids in one trace")
        self._next += num_ids
        return self._next - num_ids


UNNAMED = "unnamed "
"""Beginning of the names of sessions that no record names."""


def has_sessions(names: Collection[Hashable], num_requests: int) -> bool:
    """Return whether a record names one of the sessions ``names``, or one has two requests."""
    return len(names) < num_requests or not all(str(one).startswith(UNNAMED) for one in names)


def units(num_tokens: int, unit: int) -> int:
    """Return the number of units that ``num_tokens`` tokens fill, the last one in part."""
    return -(-num_tokens // unit)
