"""Radix tree: walks, splits and child keys, compared with plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.radix.tree import RadixTree, child_key, edge_tokens
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


def grow_path(tree, tokens, cuts):
    """Grow a resident path with nodes that end at ``cuts``. Plain objects replace KV segments."""
    node = tree.root(None)
    for end in cuts:
        node = tree.grow(node, int32(tokens[node.end : end]))
        node.kv = object()
    return node


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.data())
def test_a_walk_ends_where_prompt_and_path_differ(tokens, data):
    tree = RadixTree(1)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1)))
    grow_path(tree, tokens, cuts)
    prompt = data.draw(st.lists(st.integers(0, 2), max_size=35))
    shared = 0
    path = tokens[: cuts[-1]]
    while shared < min(len(path), len(prompt)) and path[shared] == prompt[shared]:
        shared += 1
    node, inside, length = tree.walk(tree.root(None), int32(prompt))
    assert length == shared
    assert node.end == max([0, *(cut for cut in cuts if cut <= shared)])
    assert (inside is not None) == (node.end < shared)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=20), st.data())
def test_splits_do_not_change_walks(tokens, data):
    tree = RadixTree(1)
    leaf = grow_path(tree, tokens, [len(tokens)])
    for _ in range(data.draw(st.integers(1, 4))):
        positions = range(leaf.start + 1, leaf.end)
        if not positions:
            break
        upper = tree.split(leaf, data.draw(st.sampled_from(positions)))
        upper.kv = object()
        assert leaf.parent is upper
    node, inside, length = tree.walk(tree.root(None), int32(tokens))
    assert (node, inside, length) == (leaf, None, len(tokens))
    edges = []
    while node.parent is not None:
        edges = edge_tokens(node.edge).tolist() + edges
        node = node.parent
    assert edges == tokens
