"""Launches of a copy of states at Qwen3-Next's sizes."""

import torch

from kernels.state_copy.copy import copy_states
from tests.kernels.arena import make_arena


def _copy() -> None:
    arena = make_arena(4, torch.bfloat16, torch.float32, fill=None)
    slots = torch.arange(4, dtype=torch.int32)
    copy_states([arena.recurrent, arena.conv], slots[:2], slots[2:])
    copy_states([arena.slabs], slots[:2], slots[2:])


LAUNCHES = {"copy": _copy}
