"""Ways to break the kernels in C++."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

GDN, CONV = "kernels/gdn/native.cpp", "kernels/conv1d/native.cpp"
ATTENTION, COPY = "kernels/attention/native.cpp", "kernels/state_copy/native.cpp"
LINEAR, TILE = "kernels/linear/native.cpp", "kernels/tile.h"
EXCHANGE = "kernels/exchange.cpp"
NOUNS = "gdn", "mamba2", "conv1d", "attention", "state_copy", "linear", "exchange", "tile_sizes"
TESTS = tuple(f"tests/kernels/test_{noun}.py" for noun in NOUNS)

BREAKAGES = (
    Mutation(
        "natively, an exchange has one buffer",
        EXCHANGE,
        "(2 * rank + (round & 1)) * capacity",
        "2 * rank * capacity",
        ("tests/kernels/test_exchange.py",),
    ),
    Mutation(
        "natively, an exchange is published before it is written",
        EXCHANGE,
        "    give(e.buffer(e.number));\n    Post& own = e.post(e.number);\n"
        "    own.published.store(uint32_t(e.round));\n",
        "    Post& own = e.post(e.number);\n    own.published.store(uint32_t(e.round));\n"
        "    give(e.buffer(e.number));\n",
        ("tests/kernels/test_exchange.py",),
    ),
    Mutation(
        "natively, an exchange adds whoever adds first",
        EXCHANGE,
        "(const T*)e.buffer(rank) + block",
        "(const T*)e.buffer((rank + e.number) % e.count) + block",
        ("tests/kernels/test_exchange.py",),
    ),
    Mutation(
        "natively, an exchange waits again after one that failed",
        EXCHANGE,
        "    if (e.failure) return false;\n",
        "",
        ("tests/kernels/test_exchange.py",),
    ),
    Mutation(
        "natively, an exchange does not look at who has gone",
        EXCHANGE,
        "if (e.lines[i].revents && !is_there())",
        "if (false)",
        ("tests/kernels/test_exchange.py",),
    ),
    Mutation(
        "natively, every verified token starts from the sequence's own state",
        GDN,
        "            before = after;\n",
        "",
        ("tests/kernels/test_gdn.py",),
    ),
    Mutation(
        "natively, every verified token starts from the sequence's own window",
        CONV,
        "            before = after;\n",
        "",
        ("tests/kernels/test_conv1d.py",),
    ),
    Mutation(
        "natively, a prompt carries on with a state that its checkpoint could not hold",
        TILE,
        "sizeof(S) < 4 && i",
        "sizeof(S) < 2 && i",
        ("tests/kernels/test_gdn.py", "tests/kernels/test_mamba2.py"),
    ),
    Mutation(
        "natively, a checkpoint is the state one tile later",
        TILE,
        "walk.ends[exported] != at + count - begin",
        "walk.ends[exported] > at - begin",
        ("tests/kernels/test_gdn.py", "tests/kernels/test_mamba2.py"),
    ),
    Mutation(
        "natively, a tile has 64 tokens whatever the grid",
        TILE,
        "at += walk.tile_size) {\n"
        "        int64_t count = end - at < walk.tile_size ? end - at : walk.tile_size;",
        "at += TILE) {\n        int64_t count = end - at < TILE ? end - at : TILE;",
        ("tests/kernels/test_tile_sizes.py",),
    ),
    Mutation(
        "natively, a verified token sees those drafted after it",
        ATTENTION,
        "lengths[b] - tokens + token + 1, weights",
        "lengths[b], weights",
        ("tests/kernels/test_attention.py",),
    ),
    Mutation(
        "natively, what fills the last register up is attended to",
        ATTENTION,
        "    for (int64_t j = length; j < padded; j++) weights[j] = 0.0f;\n",
        "",
        ("tests/kernels/test_attention.py",),
    ),
    Mutation(
        "natively, only the first layer's states are copied",
        COPY,
        "pool + item / copies * layer_stride",
        "pool",
        ("tests/kernels/test_state_copy.py",),
    ),
    Mutation(
        "natively, a checkpoint's scale misses what fills no register",
        COPY,
        "load_part(x + i, count - i)",
        "load_part(x + i, i + LANES > count ? 0 : LANES)",
        ("tests/kernels/test_state_copy.py",),
    ),
    Mutation(
        "natively, a code between two goes away from the even one",
        COPY,
        "bits + 0x7ffff + (bits >> 20 & 1)",
        "bits + 0x80000",
        ("tests/kernels/test_state_copy.py",),
    ),
    Mutation(
        "natively, the least codes are rounded as the others",
        COPY,
        "magnitude < 0.015625f ? steps : rounded",
        "rounded",
        ("tests/kernels/test_state_copy.py",),
    ),
    Mutation(
        "natively, all layers share the first one's scales",
        COPY,
        "slot + first_scale + layer * scales * 4",
        "slot + first_scale",
        ("tests/kernels/test_state_copy.py",),
    ),
    Mutation(
        "natively, the last output of a panel is packed as zeros",
        LINEAR,
        "for (int64_t o = 0; o < count; o++)\n                memcpy",
        "for (int64_t o = 0; o + 1 < count; o++)\n                memcpy",
        ("tests/kernels/test_linear.py",),
    ),
)

NATIVE = Mutations(
    breakages=BREAKAGES,
    tests=TESTS,
    machines=TESTS,
    copied=("kernels", "experiments", "tests", "pyproject.toml"),
)
