"""Seeded workloads by name: published benchmarks, and families that differ in prompt overlap."""

from __future__ import annotations

from collections.abc import Callable

from hybridcache.lab.generators.overlap import (
    agent_tree,
    append_only_chat,
    diffuse_cut_points,
    exact_hot_prefix,
    tree_of_thoughts,
    uniform_adversary,
)
from hybridcache.lab.generators.sharegpt_like import sharegpt_like
from hybridcache.lab.generators.tree_search import tree_search
from hybridcache.lab.generators.workloads import (
    agent,
    branch,
    chat,
    conversations,
    few_shot,
    resend,
    short,
)
from hybridcache.lab.trace import Trace

GENERATORS: dict[str, Callable[..., Trace]] = {
    "chat": chat,
    "few-shot": few_shot,
    "agent": agent,
    "branch": branch,
    "resend": resend,
    "short": short,
    "conversations": conversations,
    "sharegpt-like": sharegpt_like,
    "exact-hot-prefix": exact_hot_prefix,
    "append-only-chat": append_only_chat,
    "diffuse-cut-points": diffuse_cut_points,
    "agent-tree": agent_tree,
    "tree-of-thoughts": tree_of_thoughts,
    "uniform-adversary": uniform_adversary,
    "tree-search": tree_search,
}
