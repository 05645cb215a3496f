"""Launches at heads of 64, 128 and 256, in two dtypes and tile sizes, for shared memory only."""

import itertools
from functools import partial

import torch

from tests.kernels.launches.attention import attend
from tests.kernels.launches.linear import linear_of
from tests.kernels.launches.mla import attend_latents
from tests.kernels.launches.recurrences import Model, recurrence

WIDTHS = (64, 128, 256)


def _launches():
    for dtype, tile_size in itertools.product((torch.bfloat16, torch.float32), (64, 16)):
        word = f"{dtype} tiles {tile_size}".removeprefix("torch.")
        how = {"dtype": dtype, "tile_size": tile_size}
        for kernel, width in itertools.product(("gdn", "kda", "mamba2"), WIDTHS):
            model = Model(kernel, 4, 4, width, width)
            yield f"{kernel} {width} {word}", partial(recurrence, model, **how)
        for width in WIDTHS:
            yield f"attention {width} {word}", partial(attend, 8, 2, width, **how)
        yield f"mla {word}", partial(attend_latents, **how)
    for num_tokens, dtype in itertools.product((1, 512), (torch.bfloat16, torch.float32)):
        yield f"linear {num_tokens} {dtype}", partial(linear_of, num_tokens, dtype)


LAUNCHES = dict(_launches())
