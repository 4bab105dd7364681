"""A Python function that runs on a node: its sockets are the node's.

python examples/functions_on_nodes.py
"""

import socket

from vmmc_emu import Cluster


def add_numbers_of_clients(port: int, clients: int) -> int:
    """Serves so many clients, one after the other; the sum of what they sent."""
    total = 0
    with socket.create_server(("", port)) as listener:
        for _ in range(clients):
            connection, _ = listener.accept()
            with connection:
                total += int(connection.recv(100))
    return total


def send_number(host: str, port: int, number: int) -> str:
    """Sends a number; says from which address."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(str(number).encode())
        address: str = connection.getsockname()[0]
    return address


if __name__ == "__main__":
    with Cluster(nodes=4) as cluster:
        server = cluster.node(0).submit(add_numbers_of_clients, 4000, 3)
        cluster.node(0).wait_for_port(4000)
        for i in (1, 2, 3):
            address = cluster.node(i).python(send_number, "node0", 4000, i * 10)
            print(f"node{i} sent {i * 10} from {address}")
        print("the server on node0 adds up:", server.result())
