"""Ways to break the rule that a checkpoint stands on the grid of the kernels."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import GRID_TESTS, REFUSAL_TESTS, TILE_TESTS

CONFIG, RUNNER = "engine/config.py", "engine/run/model_runner.py"
INPUTS, PACKED = "engine/run/step_inputs.py", "kernels/packed.py"
IDENTITY = "engine/run/identity.py"

BREAKS_OF_THE_GRID = (
    Mutation(
        "a grid that tiles of 64 do not meet is taken",
        CONFIG,
        "if self.grid % TILE and self.grid not in SMALL_TILES:",
        "if self.grid % SMALL_TILES[0]:",
        (REFUSAL_TESTS,),
    ),
    Mutation(
        "a finer grid leaves the tiles as long as they were",
        CONFIG,
        "return min(self.grid, TILE)",
        "return TILE",
        (GRID_TESTS,),
    ),
    Mutation(
        "tiles are shorter than the grid of everybody else",
        CONFIG,
        "return min(self.grid, TILE)",
        "return SMALL_TILES[0]",
        (GRID_TESTS,),
    ),
    Mutation(
        "prefills are cut into tiles of 64 on any grid",
        INPUTS,
        "Packed.from_lengths(lengths, self._device, self.tile_size)",
        "Packed.from_lengths(lengths, self._device)",
        (GRID_TESTS,),
    ),
    Mutation(
        "a state is exported in the middle of a tile",
        PACKED,
        "(end % packed.tile_size and end != length)",
        "(end % TILE_SIZES[0] and end != length)",
        (TILE_TESTS,),
    ),
    Mutation(
        "of checkpoints that are narrowed there is one for 64 tokens of a step, on any grid",
        RUNNER,
        "self.most_step_tokens // config.tile_size",
        "self.most_step_tokens // 64",
        (GRID_TESTS,),
    ),
    Mutation(
        "a folder is read whatever tiles its states were computed in",
        IDENTITY,
        '"tile": str(config.tile_size)',
        '"tile": "64"',
        (GRID_TESTS,),
    ),
)
