"""Radix tree: common prefixes, compared with plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.radix.tokens import common_prefix_len

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
