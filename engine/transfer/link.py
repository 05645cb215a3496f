"""How tensors get from one process to another, behind an interface of three verbs."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from engine.transfer.wire import TransferError


class Transfer(Protocol):
    """One end of a link between two processes. Tensors arrive in the order in which they were
    sent; both sides know the size of each (it was said on the ``Wire``). Another means (NIXL,
    Mooncake) is another class with these verbs, and a word in ``hello``."""

    def send(self, data: torch.Tensor) -> None:
        """Hand over uint8, contiguous, on the host. Blocks until it is taken. TransferError: the
        other side has gone, or does not take it in time."""
        ...

    def receive(self, num_bytes: int) -> torch.Tensor:
        """uint8 ``[num_bytes]`` on the host. Blocks. TransferError as in ``send``."""
        ...

    def close(self) -> None:
        """The link is used no more."""
        ...


class Rendezvous:
    """Where the ends of links find each other: a store of torch.distributed that one side keeps.
    Each link is a process group of its own with two members, so that one that breaks takes no
    other along."""

    def __init__(self, store: TCPStore, timeout_s: float) -> None:
        self._store, self._timeout = store, timedelta(seconds=timeout_s)

    @classmethod
    def keep(cls, timeout_s: float) -> Rendezvous:
        """A new one, on a free port of this machine."""
        store = TCPStore(
            "localhost",
            0,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        return cls(store, timeout_s)

    @classmethod
    def find(cls, host: str, port: int, timeout_s: float) -> Rendezvous:
        """The one that another keeps. TransferError: there is none."""
        try:
            wait = timedelta(seconds=timeout_s)
            return cls(TCPStore(host, port, timeout=wait, wait_for_workers=False), timeout_s)
        except RuntimeError as error:
            raise TransferError(f"its rendezvous does not answer ({_first(error)})") from error

    @property
    def port(self) -> int:
        return int(self._store.port)

    def link(self, name: str, rank: int, own_host: str) -> GroupTransfer:
        """One end (``rank`` 0 or 1) of the link ``name``; returns when both are there.
        TransferError: the other is not."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        options._threads = 1
        try:
            options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
            store = PrefixStore(name, self._store)
            return GroupTransfer(ProcessGroupGloo(store, rank, 2, options), 1 - rank)
        except RuntimeError as error:
            raise TransferError(f"no link came about ({_first(error)})") from error


class GroupTransfer:
    """Point to point over a gloo process group of two."""

    def __init__(self, group: ProcessGroupGloo, other: int) -> None:
        self._group: ProcessGroupGloo | None = group
        self._other = other

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
    """The gist of what torch.distributed says at length."""
    return str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:160]
