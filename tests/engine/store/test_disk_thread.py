"""Tests of the order in which the disk's thread runs its jobs."""

from __future__ import annotations

from threading import Event

import pytest

from engine.plugins.tiers.disk import DiskThread


def test_urgent_jobs_run_first_and_idle_jobs_last() -> None:
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


def test_close_runs_queued_jobs_but_no_idle_ones() -> None:
    thread, begin, done = DiskThread(), Event(), list[str]()
    thread.run_later(begin.wait)
    thread.when_idle(lambda: done.append("idle"))
    thread.run_later(lambda: done.append("written"))
    begin.set()
    assert thread.close(10)
    assert done == ["written"]


def test_errors_are_raised_by_result() -> None:
    thread = DiskThread()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result()
    assert thread.submit(lambda: 1).result() == 1
    assert thread.close(10)


def test_errors_of_jobs_without_a_result_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    thread = DiskThread()
    thread.run_later(lambda: 1 // 0)
    assert thread.submit(lambda: 1).result() == 1 and "ZeroDivisionError" in caplog.text
    assert thread.close(10)


def test_close_gives_up_on_a_job_that_hangs() -> None:
    thread, responds = DiskThread(), Event()
    assert thread.busy_s == 0
    thread.run_later(responds.wait)
    assert not thread.close(0.01) and thread.busy_s > 0.01
    responds.set()
    assert thread.close(10) and thread.busy_s == 0
