"""The pytest plugin as its users meet it: in a test suite of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vmmc_emu.paths import known_clusters


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A test suite in a directory of its own, run by a pytest process of its own."""
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider -p no:randomly\n")
    return pytester


def ours() -> set[str]:
    return {paths.cluster for paths in known_clusters()}


def test_fixtures(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import sys

        def test_ready(vmmc):
            assert len(vmmc.nodes) == 4
            done = vmmc.node(3).run([sys.executable, "-c", "import socket; print(socket.gethostname())"],
                                    capture_output=True, text=True)
            assert done.stdout == "node3\\n"

        def test_factory(vmmc_cluster):
            first, second = vmmc_cluster(nodes=2), vmmc_cluster(nodes=3)
            assert (len(first.nodes), len(second.nodes)) == (2, 3)
            assert first.name != second.name

        def test_connect(vmmc):
            program = "import socket as s; l = s.create_server(('', 4000)); l.accept()[0].sendall(b'hello')"
            server = vmmc.node(1).popen([sys.executable, "-c", program])
            vmmc.node(1).wait_for_port(4000)
            with vmmc.node(1).connect(4000) as connection:
                assert connection.recv(10) == b"hello"
            assert server.wait(10) == 0
            assert vmmc.counters()["node1"]["connections_opened"] >= 1
    """)
    before = ours()
    suite.runpytest_subprocess("-q").assert_outcomes(passed=3)
    assert ours() == before


def test_faults_in_a_suite(suite: pytest.Pytester) -> None:
    """Links, partitions and profiles, from the fixtures."""
    suite.makepyfile("""
        import sys

        SERVER = "import socket as s; l = s.create_server(('', 4000)); l.accept()[0].sendall(bytes(1 << 20))"

        def test_loss(vmmc):
            vmmc.link(0, 1).set(loss=0.2, seed=1)
            client = "import socket as s; c = s.create_connection(('node1', 4000)); n = 0\\n" \
                     "while d := c.recv(1 << 16): n += len(d)\\nprint(n)"
            vmmc.node(1).popen([sys.executable, "-c", SERVER])
            vmmc.node(1).wait_for_port(4000)
            reading = [sys.executable, "-c", client]
            done = vmmc.node(0).run(reading, capture_output=True, text=True, check=True)
            assert done.stdout == f"{1 << 20}\\n"
            assert vmmc.counters()["node0"]["wire_dropped"] + vmmc.counters()["node1"]["wire_dropped"] > 0

        def test_partition(vmmc):
            vmmc.partition([0, 1], [2, 3])
            assert not any(wire.up for ends, wire in vmmc.link(1, 2).wires().items())
            assert all(wire.up for ends, wire in vmmc.link(0, 1).wires().items())
            vmmc.heal()
            assert all(wire.up for ends, wire in vmmc.link(1, 2).wires().items())

        def test_profile(vmmc_cluster):
            wires = vmmc_cluster(nodes=2, profile="wan").link(0, 1).wires()
            assert all(wire.delay_ns > 0 for wire in wires.values())
    """)
    suite.runpytest_subprocess("-q").assert_outcomes(passed=3)


def test_logs_of_a_failing_test(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        def test_fails(vmmc):
            assert False, "on purpose"

        def test_passes(vmmc):
            pass
    """)
    result = suite.runpytest_subprocess("-q")
    result.assert_outcomes(passed=1, failed=1)
    # One section, of the failing test's cluster: its daemons' and NICs' logs.
    sections = [line for line in result.outlines if line.strip("- ").startswith("cluster test-")]
    assert len(sections) == 1
    assert any("node3" in line for line in result.outlines)


def test_side_by_side(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import sys, pytest

        @pytest.mark.parametrize("number", range(4))
        def test_same_port(vmmc_cluster, number):
            cluster = vmmc_cluster(nodes=2)
            program = "from socket import *; create_server(('', 5000)).accept()[0].sendall(b'%d')" % number
            server = cluster.node(0).popen([sys.executable, "-c", program])
            cluster.node(0).wait_for_port(5000)
            client = "import socket; print(socket.create_connection(('node0', 5000)).recv(10).decode())"
            done = cluster.node(1).run([sys.executable, "-c", client], capture_output=True, text=True)
            assert done.stdout == f"{number}\\n"
            assert server.wait(10) == 0
    """)
    before = ours()
    suite.runpytest_subprocess("-q", "-n", "2").assert_outcomes(passed=4)
    assert ours() == before


def test_cleaned_up_when_pytest_is_killed(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import sys, time

        def test_stays(vmmc):
            vmmc.node(0).popen([sys.executable, "-c", "import signal; signal.pause()"])
            print("ready", vmmc.name, flush=True)
            sys.stdin.read()
    """)
    before = ours()
    tests = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=suite.path,
    )  # fmt: skip
    assert tests.stdout is not None
    line = ""
    while not line.startswith("ready"):
        line = tests.stdout.readline()
        assert line, "pytest ended before the test was ready"
    name = line.split()[1]
    assert name in ours()
    left = [p for p in psutil.process_iter() if _belongs_to(p, name)]
    assert left
    os.kill(tests.pid, signal.SIGKILL)
    tests.communicate()
    _, alive = psutil.wait_procs([p for p in left if p.pid != tests.pid], timeout=20)
    assert alive == []
    assert ours() == before
    assert not list(Path("/dev/shm").glob(f"vmmc.{os.getuid()}.{name}.*"))


def _belongs_to(process: psutil.Process, cluster: str) -> bool:
    try:
        return cluster in " ".join(process.cmdline()) or process.environ().get("VMMC_CLUSTER") == cluster
    except psutil.Error:
        return False
