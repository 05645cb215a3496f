"""Rendering of the tree as text, graphviz and SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from hybridcache.radix.tree import RadixNode
from tests.cache.serving import (
    hybrid,
    ids,
    publish,
    serve,
)


@pytest.fixture
def cache():
    cache = hybrid(num_slots=3)
    serve(cache, ids("system", "hello"), [6, 11])
    serve(cache, ids("system", "world"), [11])
    cache.evict(num_slots=1)
    cache.lock(cache.match(ids("system", "world", "!")).node)
    return cache


def test_text_is_an_indented_outline(cache):
    assert cache.render().splitlines() == [
        "namespace None",
        "`- 0..6 * slot 0 superseded",
        "   |- 6..11 * slot 2 locked 1x",
        "   `- 6..11 ~ ghost - checkpoint evicted",
    ]


def test_text_stops_after_max_nodes(cache):
    assert cache.render(max_nodes=1).splitlines()[-1] == "... 2 more nodes"


def test_an_only_child_is_not_indented():
    cache = hybrid()
    for prompt in ("a", "ab", "abc", "abcX", "abcY", "abcYZ", "q"):
        publish(cache, ids(prompt))
    assert cache.render().splitlines() == [
        "namespace None",
        "|- 0..1",
        "|  1..2",
        "|  2..3",
        "|  |- 3..4",
        "|  `- 3..4",
        "|     4..5",
        "`- 0..1",
    ]


@pytest.fixture
def cache_of_tenants():
    cache = hybrid(num_kv_tokens=10_000)
    for tenant in range(3000):
        publish(cache, ids([tenant, 1]), namespace=("tenant", tenant))
    return cache


def test_rendering_reads_only_max_nodes_nodes(cache_of_tenants, monkeypatch):
    seen = set()
    start = RadixNode.start.fget
    monkeypatch.setattr(RadixNode, "start", property(lambda node: seen.add(node) or start(node)))
    for form, num_lines in (("text", 21), ("graphviz", 34), ("svg", 130)):
        seen.clear()
        picture = cache_of_tenants.render(form, max_nodes=10)
        assert "... 2990 more nodes and 2990 more namespaces" in picture
        assert len(picture.splitlines()) <= num_lines
        assert len(seen) == 10
    assert "... 1 more node" not in cache_of_tenants.render(max_nodes=3000)
    assert cache_of_tenants.render(max_nodes=2999).endswith("... 1 more node and 1 more namespace")
    assert cache_of_tenants.render(max_nodes=0) == "... 3000 more nodes and 3000 more namespaces"


def test_rendering_does_not_iterate_over_children_past_the_limit():
    cache = hybrid(num_kv_tokens=10_000)
    for token in range(3000):
        publish(cache, ids([token]))
    visited = []
    root = cache._tree.roots[None]

    class Watched(dict):
        def values(self):
            watched = super().values()

            class View:
                __len__ = lambda _: len(watched)  # noqa: E731

                def __iter__(_):
                    for child in watched:
                        visited.append(child)
                        yield child

            return View()

    root.children = Watched(root.children)
    for form in ("text", "graphviz", "svg"):
        visited.clear()
        cache.render(form, max_nodes=5)
        assert len(visited) <= 6


SPECIAL_CHARACTERS = 'two\nlines \x00\x1b\ufffe\ud800 <&> "\\'


def test_special_characters_in_labels_and_namespaces_are_escaped():
    cache = hybrid()
    rows, slot = cache.allocate_kv(3), cache.allocate_slot()
    cache.insert(ids("abc"), rows, [(3, slot)], SPECIAL_CHARACTERS, labels=[SPECIAL_CHARACTERS])
    publish(cache, ids("abc"), namespace="x" * 10_000)
    outline = cache.render()
    assert len(outline.splitlines()) == 4 and len(outline) < 400
    assert "two\\nlines \\x00\\x1b" in outline and outline.replace("\n", "").isprintable()
    source = cache.render("graphviz")
    assert source.replace("\n", "").isprintable()
    for line in source.splitlines():
        bare = line.replace("\\\\", "").replace('\\"', "")
        assert bare.count('"') in (0, 2) and "\\" not in bare
    drawing = ElementTree.fromstring(cache.render("svg").encode())
    titles = [element.text for element in drawing.iter() if element.tag.endswith("title")]
    assert 'lines \\x00\\x1b\\ufffe\\ud800 <&> "' in titles[0]


def test_graphviz_has_a_box_and_an_edge_for_each_node(cache):
    source = cache.render("graphviz")
    assert source.count("->") == cache.num_nodes == 3
    assert source.splitlines()[2:-1] == [
        '  r0 [label="namespace None", shape=ellipse];',
        '  n0 [label="0..6 * slot 0 superseded", style=filled];',
        "  r0 -> n0;",
        '  n1 [label="6..11 * slot 2 locked 1x", style=filled];',
        "  n0 -> n1;",
        '  n2 [label="6..11 ~ ghost - checkpoint evicted", style=dashed];',
        "  n0 -> n2;",
    ]
    assert source.startswith("digraph") and source.endswith("}")


def test_svg_is_well_formed_and_shows_every_node(cache):
    cache.evict(num_tokens=1)
    drawing = ElementTree.fromstring(cache.render("svg"))
    titles = [element.text for element in drawing.iter() if element.tag.endswith("title")]
    assert len(titles) == cache.num_nodes
    assert any("ghost" in title for title in titles)


def test_svg_has_a_legend_an_axis_and_namespace_titles(cache):
    serve(cache, ids("system", "other"), namespace=("tenant", 1))
    drawing = ElementTree.fromstring(cache.render("svg"))
    texts = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert {"namespace None", "namespace ('tenant', 1)"} <= set(texts)
    assert {"KV", "checkpoint", "superseded", "checkpoint evicted", "locked"} <= set(texts)
    assert {"0", "5", "10", "tokens from the start of the prompt"} <= set(texts)
    assert not any(text.startswith("...") for text in texts)


def test_svg_bars_match_their_tokens_and_do_not_overlap(cache):
    serve(cache, ids("system", "hello", "more"), [15])
    drawing = ElementTree.fromstring(cache.render("svg"))
    bars = [bar for bar in drawing.iter() if len(bar) and bar[0].tag.endswith("title")]
    assert len(bars) == cache.num_nodes
    boxes = []
    for bar in bars:
        x, y, width, height = (float(bar.get(name)) for name in ("x", "y", "width", "height"))
        start, end = map(int, bar[0].text.split()[0].split(".."))
        assert x == pytest.approx(16.5 + start * 968 / 15, abs=0.1)
        assert x + width == pytest.approx(15.5 + end * 968 / 15, abs=0.2)
        for other in boxes:
            apart_x = x >= other[0] + other[2] or other[0] >= x + width
            assert apart_x or y >= other[1] + other[3] or other[1] >= y + height
        boxes.append((x, y, width, height))
    last = max(box[1] + box[3] for box in boxes)
    assert all(box[0] >= 0 and box[0] + box[2] <= 1000 for box in boxes)
    assert last < float(drawing.get("viewBox").split()[3])


def test_an_empty_tree_can_be_rendered():
    for form in ("text", "graphviz", "svg"):
        hybrid().render(form)
    with pytest.raises(ValueError, match="text, graphviz, svg"):
        hybrid().render("oil")


def test_a_deep_tree_is_rendered_without_recursion():
    cache = hybrid(num_kv_tokens=6000)
    tokens = ids(range(1500))
    for end in range(1, 1501):
        publish(cache, tokens[:end])
    for form in ("text", "graphviz", "svg"):
        picture = cache.render(form, max_nodes=5000)
        assert "1499..1500" in picture
        assert len(picture) < 200 * 1500, "the size of the picture grows with the depth"
