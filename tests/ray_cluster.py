"""A Ray cluster of several node processes on this machine's loopback address, whose nodes can be killed."""

import ipaddress
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOPBACK = "127.0.0.1"
STORE_BYTES = 80 * 2**20
# Ray reads them when it is imported, here and in whoever joins. Without the second one it replaces 127.0.0.1 by the
# machine's outward address.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
os.environ.update(ENVIRONMENT)


@contextmanager
def ray_cluster(n_nodes: int) -> Iterator["Cluster"]:
    """A head and n_nodes more nodes, of one CPU each."""
    # Ray takes signals of the process that starts a node; the tests after this one have a use for them.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    cluster = Cluster(n_nodes)
    try:
        yield cluster
    finally:
        cluster.cluster.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


class Cluster:
    """address: what RAY_ADDRESS must be. nodes: of ray.cluster_utils."""

    def __init__(self, n_nodes: int):
        import ray.cluster_utils

        common = {"node_ip_address": LOOPBACK, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        assert ray._private.services.resolve_ip_for_localhost(LOOPBACK) == LOOPBACK, "Ray was imported before"
        # A killed node is noticed after some seconds, not after half a minute.
        noticing = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        head = {**common, "num_cpus": 1, "_system_config": noticing}
        self.cluster = ray.cluster_utils.Cluster(True, head_node_args=head)
        self.address = self.cluster.address
        self.nodes = [self.cluster.add_node(wait=False, num_cpus=1, **common) for _ in range(n_nodes)]
        self.cluster.wait_for_nodes()

    @staticmethod
    def processes(node) -> list[psutil.Process]:
        """A node's raylet and all that it has started, runs too."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def runs_of(self, node) -> list[str]:
        """Names of the runs that a node carries out."""
        words = []
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):  # some live for a moment only
                words.append(process.cmdline())
        return [line[line.index("--job") + 1] for line in words if "--job" in line]

    def kill(self, node) -> None:
        """End a node as a power cut would: no process of it has time for anything."""
        processes = self.processes(node)
        for act in (psutil.Process.suspend, psutil.Process.kill):  # none may see another one die
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    act(process)


def outward_connections() -> list[str]:
    """Addresses off the loopback range to which this process and its descendants are connected."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    pids = {process.pid for process in family}
    others = [c.raddr.ip for c in psutil.net_connections("inet") if c.pid in pids and c.raddr]
    return [ip for ip in others if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback]


def wait_until(condition, seconds: float) -> None:
    """Wait until `condition()` holds; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def finishes(run_log: Path) -> int:
    """How often the run whose log this is came to its end."""
    return run_log.read_text().count(": test PSNR ")
