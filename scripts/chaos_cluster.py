"""What scripts/chaos.py kills: the nodes of a Ray cluster on this machine, and processes found by their titles in /proc.

In:  nothing. Out: `Nodes`, a cluster that loses nodes and gets new ones; the processes below this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

CPUS_OF_A_NODE = 4
STORE_MB = 100

FILL = """
import sys, time, numpy, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
class Hoard:
    def fill(self, num_mb):
        self.held = [ray.put(numpy.ones(1 << 20, numpy.uint8)) for _ in range(num_mb)]

nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
hoards = [Hoard.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes]
ray.get([hoard.fill.remote(int(sys.argv[1])) for hoard in hoards])
print("full", flush=True)
time.sleep(3600)
"""


class Nodes:
    """The cluster: a head without CPUs, on which the driver is, and nodes that can be killed."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes: list[Any] = []
        self.fill()

    @property
    def address(self) -> str:
        return self._cluster.address or ""

    def fill(self) -> None:
        """Have two nodes again."""
        while len(self.nodes) < 2:
            self.nodes.append(self._cluster.add_node(num_cpus=CPUS_OF_A_NODE, object_store_memory=STORE_MB << 20))

    def kill(self, node: Any, *, with_processes: bool = True) -> None:
        """A node dies, with all processes below its raylet or the raylet alone."""
        self.nodes.remove(node)
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *(descendants(raylet) if with_processes else ())]:
            kill(pid)
        self._cluster.remove_node(node, allow_graceful=False)

    def with_process(self, word: str) -> list[Any]:
        """Nodes on which a process runs whose title has the word."""
        return [
            node
            for node in self.nodes
            if any(word in title for title in descendants(node.all_processes["raylet"][0].process.pid).values())
        ]

    def announce(self, node: Any, seconds: int) -> None:
        """A node is told that it will be taken away in so many seconds, as a spot machine is."""
        ray = Path(sys.executable).with_name("ray")
        command = f"drain-node --address {self.address} --node-id {node.node_id} --reason DRAIN_NODE_REASON_PREEMPTION"
        words = [*command.split(), "--reason-message", "taken back", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([ray, *words], check=True, capture_output=True)

    def fill_stores(self) -> subprocess.Popen[bytes]:
        """Take nine tenths of every node's object store; given back with the process."""
        environment = os.environ | {"RAY_ADDRESS": self.address}
        command = [sys.executable, "-c", FILL, str(STORE_MB * 9 // 10)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"full", "the stores could not be filled"
        return process

    def shutdown(self) -> None:
        self._cluster.shutdown()


def processes() -> dict[int, tuple[int, str]]:
    """Parent and title of every process of this machine that is alive, by its number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if state not in "ZX":
            found[int(folder.name)] = (int(parent), title)
    return found


def descendants(root: int) -> dict[int, str]:
    """Titles of all processes below one."""
    alive = processes()
    below: dict[int, str] = {}
    new = {root}
    while new:
        new = {pid for pid, (parent, _) in alive.items() if parent in new}
        below |= {pid: alive[pid][1] for pid in new}
    return below


def with_title(*words: str) -> dict[int, str]:
    """Processes below this one whose title has one of the words."""
    return {pid: title for pid, title in descendants(os.getpid()).items() if any(word in title for word in words)}


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_until(is_so: Callable[[], object], deadline: float) -> bool:
    """Whether it came to be so before the deadline (time.monotonic)."""
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
