"""Write rates of replicas, compared with the list of all bytes that were sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridcache.adapters.routing.precise import WriteRate

SENT = st.tuples(st.integers(0, 60), st.integers(0, 8), st.integers(0, 5))


@given(st.lists(SENT, max_size=40), st.one_of(st.none(), st.integers(1, 150)))
def test_the_write_rate_covers_the_last_capacity_of_bytes(
    sent: list[tuple[int, int, int]], capacity: int | None
) -> None:
    write_rate, now = WriteRate(capacity, 0.0), 0.0
    num_bytes = seconds = 0
    points = [(0.0, 0, 0)]
    for more_bytes, more_seconds, pause in sent:
        now += pause
        write_rate.sent(more_bytes, more_seconds, now)
        num_bytes, seconds = num_bytes + more_bytes, seconds + more_seconds
        if more_bytes:
            points.append((now, num_bytes, seconds))
        full = num_bytes - capacity if capacity is not None else -1
        since, bytes_before, before = [points[0], *(p for p in points[:-1] if p[1] <= full)][-1]
        assert write_rate.totals() == (num_bytes - bytes_before, since, seconds - before)
