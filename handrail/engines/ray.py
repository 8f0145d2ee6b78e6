"""Ray engine: the processes of a run as workers of Ray Train, on an existing cluster or a local one.

It runs a function in every worker, as torchrun would, and knows nothing of training. Ray places the workers,
connects them through torch.distributed, and starts them again after one is lost; a small actor on the
driver's node, the mailbox, carries events to the driver and a request to stop to the workers.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handrail._util.errors import Paused, UserError
from handrail._util.interrupts import Interrupts
from handrail._util.processes import LONGEST_WAIT
from handrail.engines.mailbox import Mailbox

Post = Callable[..., None]
"""Sends an event to the driver: a name and values that pickle."""
Work = Callable[[Post, int, list[Any]], Any]
"""What every worker runs, with the number of times that the workers were started, 1 if none was lost, and the
samplers. The result of rank 0 is returned on the driver."""
Samplers = Callable[[int, bool], list[Any]]
"""Starts a number of sampler actors, on GPUs or not."""

CONNECT = 10.0
"""Seconds to wait for the cluster of RAY_ADDRESS."""
STORAGE = ".ray"
"""Ray's own files in a run directory while the run lasts; also shows whether a node shares the directory."""


def run_on_ray(
    work: Work,
    directory: Path,
    workers: tuple[int, int] | None,
    use_gpus: bool,
    receive: Callable[..., None],
    samplers: int = 0,
    start_samplers: Samplers = lambda number, on_gpus: [],
    units: int = 1,
) -> Any:
    """Run ``work`` in every worker and return the result of rank 0; ``receive`` is called with its events.

    The cluster is the one of RAY_ADDRESS or, without that, a local one that ends with the run. ``workers`` is
    the least and the largest number of processes (default: one per GPU of the cluster that ``samplers`` leave
    free if ``use_gpus``, else 1). ``units``: GPUs, or CPU cores, of a sampler. ``directory`` must be the same
    on every node. If a worker, a node or a sampler is lost, or if more workers become possible, ``work`` is
    called again in new workers, until it returns or makes no progress: an event "step", with its number
    first, is progress.

    SIGINT or SIGTERM asks every worker to stop, as in a run without Ray. Raises UserError if Ray or its
    cluster cannot be used, and what ``work`` raises.
    """
    with cluster((workers[1] if workers else 1) + samplers * units):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = ([int(each.get(kind, 0)) for each in resources] for kind in ("GPU", "CPU"))
        gpus = gpus if use_gpus else []
        least, most = count_workers(workers, samplers, gpus, cpus, units)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actors = start_samplers(samplers, sum(gpus) > 0)
        # Every worker keeps a call waiting.
        mailbox = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=100_000)(Mailbox).remote()
        storage = directory.absolute() / STORAGE
        place = Place(Path.cwd(), storage, socket.gethostname())
        # Arguments of the trainer would appear in Ray's records of the run; what a closure holds does not.
        trainer = TorchTrainer(
            lambda: in_worker(work, mailbox, place, actors),
            torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
            scaling_config=ScalingConfig(
                num_workers=least if least == most else (least, most), use_gpu=sum(gpus) > 0
            ),
            run_config=RunConfig(
                name=STORAGE,
                storage_path=str(directory.absolute()),
                failure_config=FailureConfig(max_failures=-1),
            ),
        )
        try:
            return fit(trainer, mailbox, receive)
        finally:
            for actor in (*actors, mailbox):  # in a process that stays connected, they would live on
                ray.kill(actor)
            shutil.rmtree(storage, ignore_errors=True)


def count_workers(
    workers: tuple[int, int] | None,
    samplers: int,
    gpus: Sequence[int],
    cpus: Sequence[int],
    units: int = 1,
) -> tuple[int, int]:
    """Return the least and the largest number of workers.

    ``gpus``: GPUs of each node; none if they are not used. ``cpus``: CPU cores of each node. ``units``: GPUs,
    or CPU cores, of a sampler.

    Raises UserError if the cluster's GPUs or CPU cores do not suffice. Ray would wait for more of them.
    """
    nodes, unit = (gpus, "GPUs") if sum(gpus) else (cpus, "CPU cores")
    least, most = workers or (max(sum(gpus) - samplers * units, 1),) * 2
    if least + samplers * units > sum(nodes):
        apart = f" and --samplers is {samplers}" if samplers else ""
        apart += f" with {units} {unit} each (sampler.tensor_parallel)" if units > 1 else ""
        instead = ', or set model.device = "cpu"' if sum(gpus) else ""
        raise UserError(
            f"--workers is {least}{apart}, but the cluster has {sum(nodes)} {unit}; lower it{instead}"
        )
    if (places := sum(node // units for node in nodes)) < samplers:
        raise UserError(
            f"sampler.tensor_parallel is {units}, but the nodes have room for {places} samplers with {units} "
            f"{unit} of one node, and --samplers is {samplers}; lower either"
        )
    return least, most


@contextmanager
def cluster(processes: int) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start a local one and end it after the block.

    A process that is connected already stays so.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Without this, a cluster that we start would send statistics on the user's behalf.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the priority of torchrun's processes
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise UserError(
            f'--ray needs Ray Train, which is not installed ({error}): pip install "handrail[ray]"'
        ) from error
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS is {address}, an address for Ray Client; start the command on a node of the "
            "cluster, for example with ray job submit"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:  # because ray.init() tries for minutes
            socket.create_connection((host, int(port)), CONNECT).close()
        except OSError as error:
            raise UserError(
                f"RAY_ADDRESS is {address}, where no cluster answers ({error.strerror})"
            ) from error
    # A local cluster runs as many processes as it is asked to, as torchrun does.
    started = {"num_cpus": max(os.cpu_count() or 1, processes), "include_dashboard": False}
    try:
        ray.init(
            address, log_to_driver=False, logging_level=logging.ERROR, **started if address == "local" else {}
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Ray uses the token that ``ray start`` has found only if it is told so.
        token = (
            "" if "RAY_AUTH_MODE" in os.environ else "; if its nodes want a token, set RAY_AUTH_MODE=token"
        )
        raise UserError(
            f"RAY_ADDRESS is {address}, which Ray cannot use ({first_line(error)}){token}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def fit(trainer: Any, mailbox: Any, receive: Callable[..., None]) -> Any:
    """Run the trainer in a thread; in this one, hand over its events and pass on a signal."""
    import ray
    from ray.train import TrainingFailedError

    with Interrupts("stopping with a checkpoint") as interrupts, ThreadPoolExecutor(1) as thread:
        fitted = thread.submit(trainer.fit)
        done = asked = False
        try:
            while not done:
                done = fitted.done()  # before the last events are taken
                for event in ray.get(mailbox.take.remote(0.0 if done else 0.2)):
                    receive(*event)
                if interrupts.asked and not asked:
                    asked = ray.get(mailbox.stop.remote(interrupts.asked))
        except BaseException:  # which leaves this block only when the workers have ended
            ray.get(mailbox.stop.remote("a failure of the driver"))
            raise
        if error := ray.get(mailbox.outcome.remote()):
            raise error
        try:
            return fitted.result().return_value
        except TrainingFailedError as error:
            raise UserError(f"Ray cannot run the workers: {first_line(error)}") from error


@dataclass(frozen=True)
class Place:
    """Where the driver runs: its working directory, a directory that it has just written, and its node."""

    directory: Path
    storage: Path
    node: str

    def enter(self) -> None:
        """Work where the driver does. Raises UserError if this node does not share its directories."""
        node = socket.gethostname()
        for path in (self.storage, self.directory):
            if not path.is_dir():
                shown = path.parent if path is self.storage else path
                raise UserError(
                    f"{shown} on {self.node} is not there on {node}; put the run, its data and its "
                    "configuration on storage that every node mounts at the same path"
                )
        os.chdir(self.directory)


def in_worker(work: Work, mailbox: Any, place: Place, samplers: list[Any]) -> Any:
    """Run ``work`` in this worker, unless the run has ended; None then, and after an expected error.

    Other exceptions go to Ray, which then starts all workers again.
    """
    import ray
    from torch import distributed

    rank, size = distributed.get_rank(), distributed.get_world_size()
    begun = [ray.get(mailbox.begin.remote(size)) if rank == 0 else None]
    distributed.broadcast_object_list(begun)
    if not begun[0]:
        return None

    def listen() -> None:
        why = ray.get(mailbox.wait_for_stop.remote())
        while True:  # ``work`` may not have come to where it can be asked
            Interrupts.ask(why)
            time.sleep(0.5)

    threading.Thread(target=listen, daemon=True).start()

    def post(*event: Any) -> None:
        if rank == 0:
            ray.get(mailbox.post.remote(*event))

    try:
        place.enter()
        return work(post, begun[0], samplers)
    except (UserError, Paused) as error:
        # Usually raised in every worker. If not, Ray must end the others, which wait for this one.
        if not ray.get(mailbox.end.remote(error, size)):
            raise
        return None
    except Exception:
        ray.get(mailbox.fail.remote(traceback.format_exc()))
        raise


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
