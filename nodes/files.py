"""Files of the machine that say something else on a node: preload/names.c opens these for programs."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from vmmc_emu.names import node_address, node_address6, node_name
from vmmc_emu.paths import ClusterPaths

_LOOPBACK, _GLOBAL, _PERMANENT = 0x10, 0x00, 0x80  # Linux's scopes of an address, and a flag


def write(place: ClusterPaths, nodes: int) -> None:
    """Writes them for every node; OSError: there is no room."""
    names = "".join(
        f"{address}\t{node_name(node)}\n"
        for node in range(nodes)
        for address in (node_address(node), node_address6(node))
    )
    try:
        machine = Path("/etc/hosts").read_bytes()
    except OSError:
        machine = b""
    # The nodes first: the first line that has a name counts.
    place.hosts.write_bytes(names.encode() + machine)
    for node in range(nodes):
        lines = (
            _interface("::1", 1, 128, _LOOPBACK, "lo"),
            _interface(node_address6(node), 2, 64, _GLOBAL, "vmmc0"),
        )
        place.interfaces(node).write_text("".join(lines), encoding="ascii")


def _interface(address: str, index: int, prefix: int, scope: int, name: str) -> str:
    """A line of /proc/net/if_inet6, as the kernel's if6_seq_show writes them."""
    digits = ipaddress.IPv6Address(address).packed.hex()
    return f"{digits} {index:02x} {prefix:02x} {scope:02x} {_PERMANENT:02x} {name:>8}\n"
