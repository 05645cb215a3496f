"""What a copy of states launches on Qwen3-Next's sizes."""

import torch

from kernels.state_copy.copy import copy_states


def _copy() -> None:
    recurrent = torch.empty(2, 4, 32, 128, 128)
    conv = torch.empty(2, 4, 8192, 3, dtype=torch.bfloat16)
    slots = torch.arange(4, dtype=torch.int32)
    copy_states([recurrent, conv], slots[:2], slots[2:])


LAUNCHES = {"copy": _copy}
