"""Tests that decisions and bits are those of ``tests/replay.json``, and that the replay finds
faults where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.runner.backends import override_all
from hybridcache.policies.placement import Backoff
from kernels.gdn import reference as gdn
from tests import replay
from tests.faults.injection import Fault
from tests.faults.test_cache_faults import FAULTS
from tests.selection import is_quick

SPEC = "tree-of-thoughts?problems=2&depth=2&beam=2&proposals=3&samples=2"
UPDATE = "if this is intended: python -m tests.replay --update, and the reason in the commit"


def test_decisions_are_those_stored() -> None:
    logs = {name: run() for name, run in replay.decisions()}
    words = "\n".join(line for log in logs.values() for line in log)
    for word in ("preempted", "3 drafts", "disk to device", "checkpoint_evicted", "host to device"):
        assert word in words, f"no run has {word}"
    found = replay.differences(replay.read_store()["decisions"], logs)
    assert not found, "\n".join([*found[:3], UPDATE])


def test_bits_are_those_stored() -> None:
    """Of a machine without stored bits, those of one family run and are compared with nothing."""
    stored = replay.read_store()["bits"].get(replay.machine())
    names = [name for name, _ in replay.bit_runs()]
    if stored is None:
        names = ["qwen3_next float32"]
    elif is_quick():
        names = [name for name in names if not name.endswith("reference")]
    logs = {name: run() for name, run in replay.bit_runs() if name in names}
    for log in logs.values():
        assert [log[place].split()[2] for place in range(0, 68, 17)] == ["0", "64", "128", "128"]
    found = replay.differences({name: stored[name] for name in names}, logs) if stored else []
    assert not found, "\n".join([*found[:3], UPDATE])


def one_step_earlier(original: Any, self: Any, prefill: Any) -> Any:
    return [one._replace(position=one.position - 64) for one in original(self, prefill)]


def one_number_rounded_up(original: Any, *arguments: Any, **options: Any) -> Any:
    out = original(*arguments, **options)
    out.view(-1)[0] = torch.nextafter(out.view(-1)[0], torch.tensor(torch.inf))
    return out


def decide() -> replay.Log:
    [_, trace, cell], *_ = replay.cells([SPEC])
    return replay.closed_loop(trace, cell)


def compute() -> replay.Log:
    return replay.bits("qwen3_next", "float32", override_all("reference"))


@pytest.mark.parametrize(
    ("fault", "run", "kind"),
    [
        (FAULTS["lru evicts the newest item"], decide, "evict: "),
        (Fault(decide, Backoff, "plan", one_step_earlier), decide, "save: "),
        (Fault(compute, gdn, "decode_gdn", one_number_rounded_up), compute, "token "),
    ],
)
def test_the_first_difference_is_named(
    fault: Fault, run: replay.Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run()
    fault.inject(monkeypatch)
    wrong = run()
    place = next(
        i for i, (one, other) in enumerate(zip(right, wrong, strict=False)) if one != other
    )
    assert place > 1 and wrong[place].startswith(kind)
    text = replay.difference(right, wrong)
    assert text is not None and f"differs first at line {place + 1} of" in text
    assert text.endswith(f"base: {right[place]}\n    now:  {wrong[place]}")
    text = replay.difference(replay.hashes(right), wrong)
    assert text is not None and wrong[place] in text
    assert f"at one of lines {place // replay.CHUNK * replay.CHUNK + 1} to" in text
    assert replay.difference(right, right) is replay.difference(replay.hashes(right), right) is None
