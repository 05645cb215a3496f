"""In which order the disk's thread does what it is asked."""

from __future__ import annotations

from threading import Event

import pytest

from engine.store.disk_thread import DiskThread


def test_what_somebody_waits_for_goes_first_and_idle_work_last() -> None:
    thread, begin, done = DiskThread(), Event(), list[str]()
    thread.do(begin.wait)
    thread.when_idle(lambda: done.append("idle"))
    thread.do(lambda: done.append("written"))
    urgent = thread.do(lambda: done.append("read"), urgent=True)
    begin.set()
    urgent.result()
    thread.do(lambda: None).result()
    while len(done) < 3:
        thread.do(lambda: None).result()
    assert done == ["read", "written", "idle"]
    thread.close()


def test_an_end_does_what_is_left_and_leaves_idle_work_out() -> None:
    thread, begin, done = DiskThread(), Event(), list[str]()
    thread.do(begin.wait)
    thread.when_idle(lambda: done.append("idle"))
    thread.do(lambda: done.append("written"))
    begin.set()
    thread.close()
    assert done == ["written"]


def test_what_goes_wrong_is_raised_where_it_is_waited_for() -> None:
    thread = DiskThread()
    with pytest.raises(ZeroDivisionError):
        thread.do(lambda: 1 // 0).result()
    assert thread.do(lambda: 1).result() == 1
    thread.close()
