"""Ways to break what runs: the steps of a layer, and the pools behind them."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import LAYERS, POOL

POOLS, RESIDUAL = "engine/run/memory.py", "engine/run/layers/residual.py"
DECODER = "engine/run/models/decoder.py"

BREAKS_OF_LAYERS = (
    Mutation(
        "a norm behind a block is left out",
        RESIDUAL,
        "            hidden = self._after(hidden)\n",
        "            pass\n",
        LAYERS,
    ),
    Mutation(
        "a block without a norm before it forgets what it was to be added to",
        RESIDUAL,
        "hidden if residual is None else hidden + residual",
        "hidden",
        LAYERS,
    ),
    Mutation(
        "mixers side by side share the first one's pools",
        RESIDUAL,
        "            first += len(own)\n",
        "",
        LAYERS,
    ),
    Mutation(
        "the steps behind a mixer come before it",
        DECODER,
        "                    self._between.append([])\n",
        "                    self._between.insert(-1, [])\n",
        LAYERS,
    ),
    Mutation(
        "recurrent states lie over the conv states of an arena",
        POOLS,
        '"recurrent": aligned(sizes["conv"])',
        '"recurrent": 0',
        POOL,
    ),
    Mutation(
        "layers of one shape share one pool",
        POOLS,
        "            (count, units[isinstance(kept.spec, KVSpec)], *kept.spec.shape), kept.dtype, "
        "device\n        )\n",
        "            (count, units[isinstance(kept.spec, KVSpec)], *kept.spec.shape), kept.dtype, "
        "device\n        )[:1].expand(count, *[-1] * (1 + len(kept.spec.shape)))\n",
        POOL,
    ),
)
