"""Disturb runs on a Ray cluster of several nodes, and compare their files with those of torchrun's:
``python -m tests.reliability.ray_failures --times 10``.

Every node is a real Ray node with processes of its own, all on this machine. A run has two workers, each on
its own node. After a random step, it loses a worker (SIGKILL), a node with a worker, its driver (SIGKILL,
then ``--resume``), or the actor that samples for it (SIGKILL; only this kind of run has one). The last kind
loses a worker, too, and has its run directory on storage that takes 30 ms for every operation (see
tests/reliability/slow_storage.py for what that needs).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.reliability.processes import finished, job, left_behind, start, steps, wait_for
from tests.reliability.slow_storage import slow_storage

KINDS = ("nothing", "worker", "node", "driver", "sampler", "slow-storage")
PATIENCE = 400.0
"""Seconds for a run of a few steps, starts of Ray included, on a busy machine."""


class Nodes:
    """A cluster with a driver's node without CPUs and three nodes with one: two in use and one to spare."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = {node.node_id: node for node in (self.cluster.add_node(num_cpus=1) for _ in range(3))}
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def train(self, file: Path, run: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
        return start(
            *("train", file, "--output", run, "--ray", "--workers", "2", *options),
            environment={"RAY_ADDRESS": self.cluster.address, **environment},
        )

    def workers(self, name: str = "RayTrainWorker") -> list[dict[str, Any]]:
        """The living actors that train, or those of another class, with their node and their process."""
        from ray._private.state import actors

        found = actors().values()
        return [each for each in found if each["ActorClassName"] == name and each["State"] == "ALIVE"]

    def remove(self, node_id: str, replace: bool = True) -> None:
        """Remove a node with everything on it; by default, add another one to the cluster."""
        self.cluster.remove_node(self.nodes.pop(node_id), allow_graceful=False)
        if replace:
            self.add()

    def add(self) -> None:
        added = self.cluster.add_node(num_cpus=1)
        self.nodes[added.node_id] = added

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@contextmanager
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()


def by_torchrun(file: Path, run: Path, *options: str) -> dict[str, str]:
    """Return the files of an undisturbed run in two processes without Ray."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "handrail.cli", "train", str(file), "--output", str(run), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return left_behind(run)


def disturbed(cluster: Nodes, kind: str, file: Path, run: Path, after: int) -> tuple[dict[str, str], str]:
    """Train on the cluster and disturb the run after some steps; return its files and what it printed."""
    process = cluster.train(file, run, *(("--samplers", "1") if kind == "sampler" else ()))
    wait_for(lambda: steps(run) > after or process.poll() is not None, PATIENCE)
    if kind in ("worker", "slow-storage"):
        os.kill(random.choice(cluster.workers())["Pid"], signal.SIGKILL)
    elif kind == "node":
        cluster.remove(random.choice(cluster.workers())["Address"]["NodeID"])
    elif kind == "sampler":
        (sampler,) = cluster.workers("SamplerActor")
        os.kill(sampler["Pid"], signal.SIGKILL)
    elif kind == "driver":
        process.kill()
        process.communicate()
        process = cluster.train(file, run, "--resume")
    code, said = finished(process, PATIENCE)
    assert code == 0, said
    return left_behind(run), said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    print("| lost | runs | equal to torchrun's, to the bit | seconds a run |\n|---|---|---|---|", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as name, nodes() as cluster, ExitStack() as mounted:
        directory = Path(name)
        file = job(directory)
        whole = by_torchrun(file, directory / "whole")
        for kind in options.kinds.split(","):
            slow = kind == "slow-storage"
            place = mounted.enter_context(slow_storage(directory)) if slow else directory
            equal, started = 0, time.monotonic()
            for number in range(options.times):
                run = place / f"{kind}-{number}"
                equal += disturbed(cluster, kind, file, run, random.randint(1, 6))[0] == whole
            each = (time.monotonic() - started) / options.times
            print(f"| {kind} | {options.times} | {equal} | {each:.0f} |", flush=True)
            wrong += options.times - equal
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
