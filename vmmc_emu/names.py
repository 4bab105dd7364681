"""Names and addresses: clusters, nodes, segments, and the ways people write sets of nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from vmmc_emu.errors import ClusterError

DEFAULT_CLUSTER = "default"
NODES_DEFAULT = 8
NODES_MAX = 1024

_IPV4_NETWORK = (198 << 24) | (18 << 16)
_CLUSTER_NAME = re.compile(r"[a-z0-9-]{1,32}")


def check_cluster_name(name: str) -> str:
    """Returns `name` when it can name a cluster; else raises ClusterError."""
    if not _CLUSTER_NAME.fullmatch(name):
        raise ClusterError(
            f"{name!r} cannot name a cluster: use 1 to 32 of the characters a-z, 0-9 and '-', as in 'test-1'"
        )
    return name


def default_cluster() -> str:
    """The cluster that is meant when nobody says: VMMC_CLUSTER, else "default"."""
    return os.environ.get("VMMC_CLUSTER") or DEFAULT_CLUSTER


def check_node_count(nodes: int) -> int:
    """Returns `nodes` when a cluster can have as many; else raises ClusterError."""
    if not 1 <= nodes <= NODES_MAX:
        raise ClusterError(f"a cluster of {nodes} nodes is not possible: choose from 1 to {NODES_MAX}")
    return nodes


def node_name(node: int) -> str:
    """The name that resolves to a node: node 3 is "node3"."""
    return f"node{node}"


def node_address(node: int) -> str:
    """A node's IPv4 address: node 0 is 198.18.0.1."""
    value = _IPV4_NETWORK + node + 1
    return ".".join(str(value >> shift & 255) for shift in (24, 16, 8, 0))


def node_address6(node: int) -> str:
    """A node's IPv6 address: node 0 is fd00:766d:6d63::1."""
    return f"fd00:766d:6d63::{node + 1:x}"


def node_index(text: str | int, nodes: int) -> int:
    """The index of the node that somebody wrote as 3, "3" or "node3"; ClusterError when there is none."""
    digits = str(text).removeprefix("node")
    if not re.fullmatch("[0-9]{1,100}", digits):  # Python refuses to read some thousands
        raise ClusterError(f"{text!r} is not a node: write a number or a name such as node3")
    index = int(digits)
    if index >= nodes:
        last = f"node0 to {node_name(nodes - 1)}" if nodes > 1 else "only node0"
        raise ClusterError(f"there is no {node_name(index)}: the cluster has {last}")
    return index


def node_set(texts: Iterable[str], nodes: int) -> list[int]:
    """The nodes that "3", "0,2,5", "0-3" or several of these name, each once, in the order given."""
    found: dict[int, None] = {}
    for text in texts:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if dash:
                low, high = node_index(first, nodes), node_index(last, nodes)
                if low > high:
                    raise ClusterError(f"{part!r} counts backwards: write {high}-{low}")
                found.update(dict.fromkeys(range(low, high + 1)))
            else:
                found[node_index(first, nodes)] = None
    return list(found)


def segment_prefix(cluster: str, uid: int | None = None) -> str:
    """How the names in /dev/shm of all of a cluster's segments begin, its final dot included."""
    return f"vmmc.{os.getuid() if uid is None else uid}.{cluster}."


def segment_name(cluster: str, node: int, what: str) -> str:
    """The POSIX name of one segment: /vmmc.<uid>.<cluster>.node<i>.<what>."""
    return f"/{segment_prefix(cluster)}{node_name(node)}.{what}"
