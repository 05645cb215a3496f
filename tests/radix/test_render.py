"""Rendering of the tree as text."""

from __future__ import annotations

from hybridcache.radix import tree
from hybridcache.radix.tree import RadixNode
from tests.radix.serving import hybrid, ids, publish, serve


def test_text_is_an_indented_outline():
    cache = hybrid(num_slots=3)
    serve(cache, ids("system", "hello"), [6, 11])
    serve(cache, ids("system", "world"), [11])
    cache.evict(num_slots=1)
    cache.lock(cache.match(ids("system", "world", "!")).node)
    assert cache.render().splitlines() == [
        "namespace None",
        "`- 0..6 * slot 0 superseded",
        "   |- 6..11 * slot 2 locked 1x",
        "   `- 6..11 ~ ghost - checkpoint evicted",
    ]
    assert cache.render(max_nodes=1).splitlines()[-1] == "... nodes left out: 2"
    first, *others = cache.iter_nodes()
    assert cache.root() is first.parent and not len(cache.root().tokens)
    assert cache.root("other") is None
    assert [repr(one) for one in (first.parent, first, first.kv, first.checkpoint, *others)] == [
        "<root 0..0 locks=0>",
        "<node 0..6 checkpoint=0 locks=0>",
        "<kv 0..6 used=2>",
        "<checkpoint slot=0 at 6 used=2>",
        "<node 6..11 checkpoint=2 locks=1>",
        "<ghost 6..11 locks=0>",
    ]


def test_rendering_reads_only_max_nodes_nodes(monkeypatch):
    cache, wide = hybrid(num_kv_tokens=10_000), hybrid(num_kv_tokens=10_000)
    for tenant in range(3000):
        publish(cache, ids([tenant, 1]), namespace=("tenant", tenant))
        publish(wide, ids([tenant, 1]))
    seen, read, members = set(), [], tree.members
    monkeypatch.setattr(tree, "members", lambda of: (read.append(x) or x for x in members(of)))
    assert wide.render(max_nodes=3).count("\n") == 4 and len(read) == 4
    start = RadixNode.start.fget
    monkeypatch.setattr(RadixNode, "start", property(lambda node: seen.add(node) or start(node)))
    picture = cache.render(max_nodes=10)
    assert "... nodes left out: 2990, namespaces: 2990" in picture
    assert len(picture.splitlines()) <= 21
    assert len(seen) == 10
    assert "... nodes" not in cache.render(max_nodes=3000)
    assert cache.render(max_nodes=2999).endswith("... nodes left out: 1, namespaces: 1")
    assert cache.render(max_nodes=0) == "... nodes left out: 3000, namespaces: 3000"


SPECIAL_CHARACTERS = 'two\nlines \x00\x1b\ufffe\ud800 <&> "\\'


def test_special_characters_in_labels_and_namespaces_are_escaped():
    cache = hybrid()
    rows, slot = cache.allocate_kv(3), cache.allocate_slot()
    cache.insert(ids("abc"), rows, [(3, slot)], SPECIAL_CHARACTERS, labels=[SPECIAL_CHARACTERS])
    publish(cache, ids("abc"), namespace="x" * 10_000)
    outline = cache.render()
    assert len(outline.splitlines()) == 4 and len(outline) < 400
    assert "two\\nlines \\x00\\x1b" in outline and outline.replace("\n", "").isprintable()


def test_a_deep_tree_is_rendered_without_recursion():
    cache = hybrid(num_kv_tokens=6000)
    tokens = ids(range(1500))
    for end in range(1, 1501):
        publish(cache, tokens[:end])
    picture = cache.render(max_nodes=5000)
    assert "1499..1500" in picture
    assert len(picture) < 200 * 1500, "the size of the picture grows with the depth"
