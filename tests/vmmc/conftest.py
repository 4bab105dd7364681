"""What the VMMC tests share: endpoints on the nodes of a cluster, and the counters that prove things."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest

import vmmc_emu
from vmmc_emu import Cluster, Endpoint


class Bench:
    """A cluster, with endpoints that this process attaches to its nodes."""

    def __init__(self, cluster: Cluster, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        self.cluster = cluster
        self._patch = patch
        self._stack = stack

    def attach(self, node: int, pin_bytes: int | None = None) -> Endpoint:
        """An endpoint on a node; pin_bytes is its bound of pinned memory."""
        with self._patch.context() as patch:
            if pin_bytes is not None:
                patch.setenv("VMMC_PIN_BYTES", str(pin_bytes))
            return self._stack.enter_context(vmmc_emu.attach(node, cluster=self.cluster.name))

    def counters(self, node: int) -> dict[str, int]:
        """The counters of a node, as an observer sees them."""
        return self.cluster.node(node).counters()


@pytest.fixture
def bench(vmmc_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A cluster of two nodes, and ways to attach to it."""
    with contextlib.ExitStack() as stack:
        yield Bench(vmmc_cluster(nodes=2), monkeypatch, stack)


@pytest.fixture
def pattern() -> Callable[[int], bytes]:
    """Bytes that are alike nowhere: the n-th call of a test gives the same in every run."""
    source = random.Random(1)
    return source.randbytes
