"""Testing a distributed program with the `vmmc_cluster` and `vmmc` fixtures, which come with the package.

pytest examples/test_with_pytest.py
"""

import subprocess
import sys
from collections.abc import Callable

from vmmc_emu import Cluster

SLOW_SERVER = """
import socket
listener = socket.create_server(("", 9000))
connection, peer = listener.accept()
print("a client from", peer[0], flush=True)
connection.sendall(b"hello")
"""
CLIENT = "import socket; print(socket.create_connection(('node0', 9000)).recv(100))"


def test_client_and_server(vmmc: Cluster) -> None:
    """`vmmc`: four nodes, for this test alone."""
    server = vmmc.node(0).popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.PIPE, text=True)
    vmmc.node(0).wait_for_port(9000)
    client = vmmc.node(2).run([sys.executable, "-c", CLIENT], capture_output=True, text=True, check=True)
    assert client.stdout == "b'hello'\n"
    assert server.communicate(timeout=10)[0] == "a client from 198.18.0.3\n"


def test_clusters_are_separate(vmmc_cluster: Callable[..., Cluster]) -> None:
    """`vmmc_cluster`: as many as you like; the same port again, nobody in the way."""
    for cluster in (vmmc_cluster(nodes=1), vmmc_cluster(nodes=1)):
        server = cluster.node(0).popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.DEVNULL)
        cluster.node(0).wait_for_port(9000)
        with cluster.node(0).connect(9000) as connection:  # from this process, which is on no node
            assert connection.recv(100) == b"hello"
        assert server.wait(10) == 0
