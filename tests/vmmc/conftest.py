"""What the VMMC tests share: a cluster of two nodes, and endpoints on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest

import vmmc_emu
from vmmc_emu import Cluster, Endpoint


@pytest.fixture
def cluster(vmmc_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster of two nodes."""
    return vmmc_cluster(nodes=2)


@pytest.fixture
def attach(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    """Attaches this process to a node of it: `attach(0)`; pin_bytes is the bound of pinned memory."""
    with contextlib.ExitStack() as stack:

        def start(node: int, pin_bytes: int | None = None) -> Endpoint:
            with monkeypatch.context() as patch:
                if pin_bytes is not None:
                    patch.setenv("VMMC_PIN_BYTES", str(pin_bytes))
                return stack.enter_context(vmmc_emu.attach(node, cluster=cluster.name))

        yield start


@pytest.fixture
def ends(attach: Callable[..., Endpoint]) -> tuple[Endpoint, Endpoint]:
    """Endpoints on node 0 and on node 1."""
    return attach(0), attach(1)


@pytest.fixture
def pattern() -> Callable[[int], bytes]:
    """Bytes that are alike nowhere: the n-th call of a test gives the same in every run."""
    return random.Random(1).randbytes
