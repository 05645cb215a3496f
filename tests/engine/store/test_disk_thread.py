"""In which order the disk's thread does what it is asked."""

from __future__ import annotations

from threading import Event

import pytest

from engine.plugins.tiers.disk import DiskThread


def test_what_somebody_waits_for_goes_first_and_idle_work_last() -> None:
    thread, begin, done = DiskThread(), Event(), list[str]()
    thread.run_later(begin.wait)
    thread.when_idle(lambda: done.append("idle"))
    thread.run_later(lambda: done.append("written"))
    urgent = thread.submit(lambda: done.append("read"), urgent=True)
    begin.set()
    urgent.result()
    thread.submit(lambda: None).result()
    while len(done) < 3:
        thread.submit(lambda: None).result()
    assert done == ["read", "written", "idle"]
    assert thread.close(10)


def test_an_end_does_what_is_left_and_leaves_idle_work_out() -> None:
    thread, begin, done = DiskThread(), Event(), list[str]()
    thread.run_later(begin.wait)
    thread.when_idle(lambda: done.append("idle"))
    thread.run_later(lambda: done.append("written"))
    begin.set()
    assert thread.close(10)
    assert done == ["written"]


def test_what_goes_wrong_is_raised_where_it_is_waited_for() -> None:
    thread = DiskThread()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result()
    assert thread.submit(lambda: 1).result() == 1
    assert thread.close(10)


def test_what_goes_wrong_where_nobody_waits_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    thread = DiskThread()
    thread.run_later(lambda: 1 // 0)
    assert thread.submit(lambda: 1).result() == 1 and "ZeroDivisionError" in caplog.text
    assert thread.close(10)


def test_a_job_that_hangs_is_seen_and_left_behind() -> None:
    thread, responds = DiskThread(), Event()
    assert thread.busy_s == 0
    thread.run_later(responds.wait)
    assert not thread.close(0.01) and thread.busy_s > 0.01
    responds.set()
    assert thread.close(10) and thread.busy_s == 0
