"""vmmc-emu: a PC cluster with a user-level network (VMMC), emulated on one Linux machine.

    from vmmc_emu import Cluster

    with Cluster(nodes=4) as cluster:
        server = cluster.node(0).popen(["redis-server"])
        cluster.node(0).wait_for_port(6379)
        print(cluster.node(3).run(["redis-cli", "-h", "node0", "ping"], capture_output=True).stdout)

Programs on nodes are ordinary programs: their TCP sockets are carried by VMMC without their knowing.
A program that wants to speak VMMC itself uses `vmmc_emu.attach` (Python) or `vmmc.h` (C).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmmc_emu.cluster import Cluster, Node, RemoteCall
    from vmmc_emu.errors import ClusterError
    from vmmc_emu.vmmc import Endpoint, attach

__all__ = ["Cluster", "ClusterError", "Endpoint", "Node", "RemoteCall", "attach"]

# Loaded when first used: the command line and the daemons must start in milliseconds.
_HOMES = {
    "Cluster": "vmmc_emu.cluster",
    "ClusterError": "vmmc_emu.errors",
    "Endpoint": "vmmc_emu.vmmc",
    "Node": "vmmc_emu.cluster",
    "RemoteCall": "vmmc_emu.cluster",
    "attach": "vmmc_emu.vmmc",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vmmc_emu' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
