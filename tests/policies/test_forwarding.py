"""Policies that contain others pass on every notification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock, call

import pytest

from hybridcache.policies.eviction.priority_classes import PriorityClasses
from hybridcache.policies.placement import Placement
from hybridcache.policies.user import GUARDS
from hybridcache.radix.protocol import EvictionPolicy, Placed, PlacementPolicy, Prefill
from tests.policies.items import FakeItem

ITEM, SAVED = FakeItem("it"), Placed(64, "branch")
GHOST, PLAN = (ITEM, 36), Prefill(100, 0, 0, 0, (), 64)
NOTIFICATIONS: dict[type[Any], dict[str, tuple[Any, ...]]] = {
    PlacementPolicy: {"on_prefill": (PLAN,), "on_hit": (ITEM,), "on_ghost_hit": GHOST}
    | {"on_saved": (SAVED,), "on_dropped": (SAVED,)},
    EvictionPolicy: dict.fromkeys(("on_relabelled", "on_ghost_hit", "on_ghost_hit_above"), (ITEM,)),
}
ONLY_REST = {"on_relabelled"}
"""Notifications of present items, which only the class of the item gets."""


def classes(policies: Sequence[Any]) -> Any:
    rest, superseded = policies
    return PriorityClasses(rest, rest, superseded)


OUTER: dict[str, tuple[type[Any], int, Callable[[Sequence[Any]], Any]]] = {
    "combination": (PlacementPolicy, 3, lambda rules: Placement(tuple(rules))),
    "user's placement": (PlacementPolicy, 1, lambda own: GUARDS[PlacementPolicy]("own", own[0])),
    "priority classes": (EvictionPolicy, 2, classes),
    "user's eviction": (EvictionPolicy, 1, lambda own: GUARDS[EvictionPolicy]("own", own[0])),
}


@pytest.mark.parametrize("protocol", NOTIFICATIONS)
def test_the_table_has_every_notification(protocol: type[Any]) -> None:
    methods = {name for name in vars(protocol) if name.startswith("on_")}
    assert NOTIFICATIONS[protocol].keys() == methods - {"on_grid"}


@pytest.mark.parametrize(
    ("outer", "name"), [(outer, name) for outer in OUTER for name in NOTIFICATIONS[OUTER[outer][0]]]
)
def test_every_notification_reaches_every_policy_inside(outer: str, name: str) -> None:
    protocol, number, make = OUTER[outer]
    inside = [Mock(spec=protocol) for _ in range(number)]
    arguments = NOTIFICATIONS[protocol][name]
    assert getattr(make(inside), name)(*arguments) is None
    expected = [[call(*arguments)]] * number
    if outer == "priority classes" and name in ONLY_REST:
        expected[1:] = [[]]
    assert [getattr(policy, name).call_args_list for policy in inside] == expected
