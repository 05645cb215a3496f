"""Waits of the host for a device, on a CPU, and streams that count copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.overrides import TorchFunctionMode


class Waits(TorchFunctionMode):
    """Count of calls that wait for the device when its tensors are on a GPU."""

    NAMES = frozenset(
        ["cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__index__", "__float__"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.num += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


class Streams:
    """Module of a device with streams, which run at once. ``HostReader`` takes it for a GPU's."""

    def __init__(self) -> None:
        self.num_copies = 0
        """Times that the host waited for a stream other than the scheduling stream."""
        self.num_fences = 0
        """Times that the scheduling stream, not the host, waited for the forward passes."""
        self.current: Streams | None = None

    def Stream(self) -> Streams:
        return self

    @contextlib.contextmanager
    def stream(self, stream: Streams) -> Iterator[None]:
        self.current = stream
        yield
        self.current = None

    def current_stream(self) -> Streams:
        return self

    def wait_stream(self, stream: Any) -> None:
        """Note that copies between tiers follow the forward passes."""
        assert stream is not None
        self.num_fences += 1

    def synchronize(self) -> None:
        assert self.current is None, "the host waits inside of the block of the stream"
        self.num_copies += 1
