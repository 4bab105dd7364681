"""What a socket says of options that mean little without a kernel's TCP: granted or not, and kept."""

from __future__ import annotations

import errno
import socket
import sys

LEVELS = {
    "SOL_SOCKET": (socket.SOL_SOCKET, {
        "KEEPALIVE": 9, "BROADCAST": 6, "DONTROUTE": 5, "OOBINLINE": 10, "TIMESTAMP": 29, "TIMESTAMPNS": 35,
        "NO_CHECK": 11, "RXQ_OVFL": 40,
    }),
    "TCP": (socket.IPPROTO_TCP, {
        "NODELAY": 1, "CORK": 3, "KEEPIDLE": 4, "KEEPINTVL": 5, "KEEPCNT": 6, "SYNCNT": 7, "QUICKACK": 12,
        "THIN_LINEAR_TIMEOUTS": 16, "THIN_DUPACK": 17, "USER_TIMEOUT": 18, "NOTSENT_LOWAT": 25,
    }),
    "IP": (socket.IPPROTO_IP, {
        "TOS": 1, "TTL": 2, "RECVOPTS": 6, "PKTINFO": 8, "MTU_DISCOVER": 10, "RECVERR": 11, "RECVTTL": 12,
        "RECVTOS": 13, "FREEBIND": 15, "MINTTL": 21, "BIND_ADDRESS_NO_PORT": 24,
    }),
    "IPV6": (socket.IPPROTO_IPV6, {
        "UNICAST_HOPS": 16, "MTU_DISCOVER": 23, "RECVERR": 25, "RECVPKTINFO": 49, "RECVHOPLIMIT": 51,
        "DONTFRAG": 62, "RECVTCLASS": 66, "TCLASS": 67, "MINHOPCOUNT": 73, "FREEBIND": 78,
    }),
}  # fmt: skip
# For who may administer the machine's network; a node has none to protect.
PRIVILEGED = {
    "SOL_SOCKET": {"DEBUG": 1, "PRIORITY": 12, "MARK": 36},
    "TCP": {},
    "IP": {"TRANSPARENT": 19},
    "IPV6": {"TRANSPARENT": 75},
}
VALUES = (1, 2, 0, 63, 300, -1)


def answer(sock: socket.socket, level: int, name: int, value: int | None = None) -> str:
    try:
        if value is None:
            return str(sock.getsockopt(level, name))
        sock.setsockopt(level, name, value)
        return "granted"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def main(who: str, *hosts: str) -> None:
    """For each of the loopback addresses: new, listening and connected sockets."""
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener, socket.socket(family) as connected:
            connected.connect(listener.getsockname())
            states = {"new": socket.socket(family), "listening": listener, "connected": connected}
            for state, sock in states.items():
                for level, (number, options) in LEVELS.items():
                    if level == "IPV6" and family == socket.AF_INET:
                        continue
                    privileged = PRIVILEGED[level] if who == "administrator" else {}
                    for name, option in {**options, **privileged}.items():
                        words = [answer(sock, number, option)]
                        for value in VALUES:
                            words += [answer(sock, number, option, value), answer(sock, number, option)]
                        print(family.name, state, level, name, *words)
                sizes = (0, 1, 87, 88, 32767, 32768)
                segments = [answer(sock, socket.IPPROTO_TCP, socket.TCP_MAXSEG, size) for size in sizes]
                print(family.name, state, "TCP_MAXSEG", *segments)
                if state == "new":
                    sock.close()


main(*sys.argv[1:])
