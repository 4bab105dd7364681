"""Three ordinary web servers on one port, each on a node of its own, and a client on a fourth.

python examples/web_servers.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from vmmc_emu import Cluster

SERVER = [sys.executable, "-m", "http.server", "8000"]
CLIENT = "import sys, urllib.request as u; print(*(u.urlopen(url).read().decode() for url in sys.argv[1:]))"

with Cluster(nodes=4) as cluster, tempfile.TemporaryDirectory() as directory:
    servers = []
    for node in cluster.nodes[:3]:
        home = Path(directory, node.name)
        home.mkdir()
        (home / "name").write_text(f"this is {node.name};")
        servers.append(node.popen(SERVER, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        node.wait_for_port(8000)

    urls = [f"http://node{i}:8000/name" for i in range(3)]
    client = cluster.node(3).run(
        [sys.executable, "-c", CLIENT, *urls], capture_output=True, text=True, check=True
    )
    print(client.stdout, end="")

    for name, counters in cluster.counters().items():
        print(f"{name}: {counters['connections_opened']} connections, {counters['bytes_sent']} bytes sent")
