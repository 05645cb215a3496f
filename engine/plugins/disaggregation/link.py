"""Transfer of tensors between processes, behind an interface of three methods."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from engine.plugins.disaggregation.wire import TransferError, Wire


class Transfer(Protocol):
    """One end of a link between two processes.

    Tensors arrive in the order in which they were sent. The size of each is exchanged in messages
    on the ``Wire``. Another transport (NIXL, Mooncake) is another class with these methods, and a
    word in ``hello``.
    """

    def send(self, data: torch.Tensor) -> None:
        """Send uint8, contiguous, on the host. Blocks until it is received. Raises TransferError if
        the other side has gone, or does not receive it in time."""
        ...

    def receive(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 ``[num_bytes]`` on the host. Blocks. Raises TransferError as ``send``."""
        ...

    def close(self) -> None:
        """Close the link."""
        ...


class WireStore(Store):
    """Store through which the two ends of one link exchange their addresses.

    It uses the ``Wire`` between them. There is no listener, and nothing of it outlives the link.
    """

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Store ``value`` and send it to the other end."""
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._wire.send({"address": key}, self._values[key])

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, waiting until the other end has sent it. Raises
        TransferError if it sends anything else, or nothing in time."""
        while key not in self._values:
            said, data = self._wire.receive()
            if not isinstance(said.get("address"), str):
                raise TransferError(f"an address was expected, not {said!r:.80}")
            self._values[said["address"]] = data
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until every one of ``keys`` has a value."""
        for key in keys:
            self.get(key)


def link(wire: Wire, rank: int, timeout_s: float) -> GroupTransfer:
    """Make one end of a link: rank 0 at the prefill engine, 1 at the decode engine.

    Each link is a separate process group of two members, so that a broken link does not affect
    others. Both ends must call this at the same time, while ``wire`` is unused. Raises
    TransferError if the other end does not answer.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    store = WireStore(wire)
    try:
        options._devices = [ProcessGroupGloo.create_device(hostname=wire.own_host)]
        return GroupTransfer(ProcessGroupGloo(store, rank, 2, options), 1 - rank, store)
    except RuntimeError as error:
        raise TransferError(f"no link was made ({_first(error)})") from error


class GroupTransfer:
    """Point-to-point transfers over a gloo process group of two."""

    def __init__(self, group: ProcessGroupGloo, other: int, store: Store) -> None:
        self._group: ProcessGroupGloo | None = group
        self._other = other
        self._store = store  # The group calls it, but does not keep its Python half alive.

    def send(self, data: torch.Tensor) -> None:
        """See ``Transfer``."""
        self._do("send", data)

    def receive(self, num_bytes: int) -> torch.Tensor:
        """See ``Transfer``."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self._do("recv", data)
        return data

    def _do(self, verb: str, data: torch.Tensor) -> None:
        if self._group is None:
            raise TransferError("the link is closed")
        try:
            getattr(self._group, verb)([data], self._other, 0).wait()
        except RuntimeError as error:
            raise TransferError(f"the link broke ({_first(error)})") from error

    def close(self) -> None:
        """See ``Transfer``."""
        self._group = None


def _first(error: Exception) -> str:
    """Return the first sentence of an error of torch.distributed."""
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:160]
