"""Radix tree: child keys and common prefixes, compared with plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.radix.tree import child_key
from hybridcache.tokens import common_prefix_len

IDS = st.lists(st.sampled_from([0, 1, 255, 256, 2**31 - 1]), max_size=40)


def int32(values):
    return np.array(values, np.int32)


@given(IDS, IDS, st.sampled_from([1, 4, 16]))
def test_common_prefix_len_matches_a_plain_loop(ours, theirs, page_size):
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    expected = shared - shared % page_size
    assert common_prefix_len(int32(ours), int32(theirs), page_size) == expected


@pytest.mark.parametrize("token", [0, 1, 255, 256, 2**31 - 1])
def test_the_key_of_a_one_token_page_is_the_token_id(token):
    assert child_key(int32([token, 9]).tobytes(), 1) == token


def test_the_key_of_a_longer_page_is_its_bytes():
    edge = int32([1, 2, 3]).tobytes()
    assert child_key(memoryview(edge), 2) == edge[:8]
