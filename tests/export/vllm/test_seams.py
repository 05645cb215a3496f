"""The installed vLLM has the private code that the plug-in overrides or calls."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm, or make vllm-scheduler")

import vllm

from hybridcache.vllm import SEAMS, TESTED, require_version


def installed(seam: str) -> Any:
    """Return the method that "module:Class.method(parameters)" names in the installed version."""
    module, _, path = seam.partition("(")[0].partition(":")
    found: Any = importlib.import_module(f"vllm.v1.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


def parameters(method: Any) -> tuple[str, ...]:
    """Return the names of the parameters after ``self`` or ``cls``."""
    names = tuple(inspect.signature(method).parameters)
    return names[1:] if names[:1] in (("self",), ("cls",)) else names


@pytest.mark.parametrize("seam", SEAMS)
def test_private_code_has_the_expected_parameters(seam: str) -> None:
    expected = seam.partition("(")[2].rstrip(")").split(", ")
    found = parameters(installed(seam))
    assert expected in ([""], [*found[: len(expected)]]), (
        f"vLLM {vllm.__version__} has changed {seam}: {found} instead of {expected}"
    )


def test_every_override_is_listed() -> None:
    """A method of a class of vLLM that is overridden without being listed would break unseen."""
    from hybridcache.vllm import host, pool, scheduler

    listed = {seam.partition("(")[0].rpartition(":")[2] for seam in SEAMS}
    unlisted = []
    for module in (host, pool, scheduler):
        for name, ours in vars(module).items():
            if not inspect.isclass(ours) or ours.__module__ != module.__name__:
                continue
            theirs = [one for one in ours.__mro__ if one.__module__.startswith("vllm.")]
            for method in (one for one, value in vars(ours).items() if callable(value)):
                owners = [one for one in theirs if method in vars(one)]
                if owners and not method.startswith("__"):
                    names = {f"{one.__name__}.{method}" for one in theirs}
                    if not names & listed:
                        unlisted.append(f"{name}.{method}")
    assert not unlisted


def test_other_versions_are_refused_in_one_sentence() -> None:
    require_version(vllm.__version__)
    assert ".".join(vllm.__version__.split(".")[:2]) in TESTED
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32 and 0\.33"):
        require_version("0.34.0")
