"""Pictures of the tree say what is in it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tests.cache_serving import hybrid, ids, publish, serve


@pytest.fixture
def cache():
    cache = hybrid(num_slots=3)
    serve(cache, ids("system", "hello"), [6, 11])
    serve(cache, ids("system", "world"), [11])
    cache.evict(num_slots=1)
    cache.lock(cache.match(ids("system", "world", "!")).node)
    return cache


def test_text_is_an_outline(cache):
    assert cache.render().splitlines() == [
        "namespace None",
        "`- 0..6 * slot 0 superseded",
        "   |- 6..11 * slot 2 locked 1x",
        "   `- 6..11 ~ ghost - checkpoint evicted",
    ]


def test_text_stops_where_it_is_told(cache):
    assert cache.render(max_nodes=1).splitlines()[-1] == "... 2 more"


def test_graphviz_has_a_box_for_each_node_and_an_edge_to_it(cache):
    source = cache.render("graphviz")
    assert source.count("->") == cache.num_nodes == 3
    assert source.startswith("digraph") and source.endswith("}")


def test_svg_is_well_formed_and_shows_every_node(cache):
    cache.evict(num_tokens=1)
    drawing = ElementTree.fromstring(cache.render("svg"))
    titles = [element.text for element in drawing.iter() if element.tag.endswith("title")]
    assert len(titles) == cache.num_nodes
    assert any("ghost" in title for title in titles)


def test_an_empty_tree_can_be_drawn():
    for form in ("text", "graphviz", "svg"):
        hybrid().render(form)
    with pytest.raises(ValueError, match="text, graphviz, svg"):
        hybrid().render("oil")


def test_a_deep_tree_needs_no_recursion():
    cache = hybrid(num_kv_tokens=6000)
    tokens = ids(range(1500))
    for end in range(1, 1501):
        publish(cache, tokens[:end])
    for form in ("text", "graphviz", "svg"):
        assert "1499..1500" in cache.render(form, max_nodes=5000)
