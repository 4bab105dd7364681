"""pytest fixtures: clusters for tests.

    def test_eight_servers(vmmc_cluster):
        cluster = vmmc_cluster(nodes=8)
        server = cluster.node(0).popen(["redis-server", "--port", "6379"])
        cluster.node(0).wait_for_port(6379)
        assert cluster.node(1).run(["redis-cli", "-h", "node0", "ping"]).stdout == "PONG\n"

``vmmc_cluster`` makes clusters, ``vmmc`` is one of four nodes.  Both end with the test; the logs of their
daemons, NICs and detached programs are attached to the report of a test that fails.  Names are random,
so tests may run side by side (pytest-xdist), and a cluster belongs to the pytest process that made it: it
ends when that process does, also when it is killed.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

# Every pytest run of the environment loads this module; the rest of the package waits until a test uses it.
if TYPE_CHECKING:
    from vmmc_emu.cluster import Cluster

ClusterFactory = Callable[..., "Cluster"]

_CLUSTERS = pytest.StashKey["list[Cluster]"]()


@pytest.fixture
def vmmc_cluster(request: pytest.FixtureRequest) -> Iterator[ClusterFactory]:
    """Makes clusters: ``vmmc_cluster(nodes=4)`` takes what `Cluster` takes and returns it started."""
    from vmmc_emu.cluster import Cluster  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        clusters = request.node.stash.setdefault(_CLUSTERS, [])

        def start(nodes: int = 4, **options: Any) -> Cluster:
            name = options.pop("name", None) or f"test-{secrets.token_hex(6)}"
            cluster = stack.enter_context(Cluster(nodes=nodes, name=name, **options))
            clusters.append(cluster)
            return cluster

        yield start


@pytest.fixture
def vmmc(vmmc_cluster: ClusterFactory) -> Cluster:
    """A cluster of four nodes, ready."""
    return vmmc_cluster(nodes=4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Attaches the logs of a failing test's clusters while they still exist."""
    report = yield
    if report.failed:
        for cluster in item.stash.get(_CLUSTERS, []):
            # The report of a failing test must come out whatever state its cluster is in.
            try:
                logs = cluster.logs()
            except Exception as error:
                logs = f"(its logs cannot be read: {error})"
            if logs:
                report.sections.append((f"cluster {cluster.name}", logs))
    return report
