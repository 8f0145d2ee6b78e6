"""Runs under Ray equal torchrun's to the bit, survive losses, and leave no process and no secret behind."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest

from handrail._util.errors import UserError
from handrail.engines.mailbox import FRUITLESS_STARTS, Mailbox
from handrail.engines.ray import Place, count_workers
from handrail.engines.ray import cluster as connection
from tests.conftest import Handrail
from tests.experts.test_through_training import expert
from tests.openai_server import OpenAiServer
from tests.reliability.processes import finished, job, left_behind, start, steps, wait_for
from tests.reliability.ray_failures import PATIENCE, Nodes, by_torchrun, disturbed, nodes
from tests.training.test_loop import lines

installed = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not installed, reason='Ray is not installed: pip install "handrail[ray]"')

SECRET = "sk-never-to-be-seen-9c1f"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed run in two processes of torchrun."""
    directory = tmp_path_factory.mktemp("whole")
    return by_torchrun(job(directory), directory / "run")


def test_a_run_without_progress_is_given_up() -> None:
    async def starts() -> list[int]:
        mailbox = Mailbox()
        found = [await mailbox.begin() for _ in range(FRUITLESS_STARTS)]
        await mailbox.post("step", 0)
        found += [await mailbox.begin() for _ in range(FRUITLESS_STARTS)]
        await mailbox.post("step", 0)  # again, after a loss: no progress
        found.append(await mailbox.begin())
        assert "3 times in a row without finishing a step" in str(await mailbox.outcome())
        return found

    assert asyncio.run(starts()) == [1, 2, 3, 4, 5, 6, 0]


def test_a_run_that_goes_back_itself_makes_progress_from_there() -> None:
    async def starts() -> list[int]:
        mailbox = Mailbox()
        found = []
        for numbers in ((58, 59, 20, 21), (22,), (23,), (24,), (25,)):
            found.append(await mailbox.begin())
            for step in numbers:
                await mailbox.post("step", step)
        return found

    assert asyncio.run(starts()) == [1, 2, 3, 4, 5]


def test_more_workers_are_no_loss() -> None:
    async def starts() -> list[int]:
        mailbox = Mailbox()
        return [await mailbox.begin(workers) for workers in (2, 3, 4, 5, 6, 6, 6, 6)]

    assert asyncio.run(starts()) == [1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize(
    ("gpus", "cpus", "said"),
    [
        (0, 4, "--workers is 2 and --samplers is 3, but the cluster has 4 CPU cores; lower it$"),
        (
            4,
            64,
            "--workers is 2 and --samplers is 3, but the cluster has 4 GPUs; lower it, or set model.device",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(gpus: int, cpus: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        count_workers((2, 2), 3, [gpus], [cpus])
    assert count_workers((2, 8), 2, [gpus], [cpus]) == (2, 8)
    assert count_workers((2, 8), 1, [gpus], [cpus], 2) == (2, 8)
    with pytest.raises(UserError, match=r"--samplers is 1 with 4 .* each \(sampler.tensor_parallel\)"):
        count_workers((2, 2), 1, [gpus], [cpus], 4)
    with pytest.raises(UserError, match="is 4, but the nodes have room for 0 samplers with 4 .* of one node"):
        count_workers((2, 2), 1, [gpus // 2] * 3, [cpus // 2] * 3 if not gpus else [64], 4)


def test_ray_starts_workers_again_only_if_not_all_of_them_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handrail.engines.mailbox.TOGETHER", 0.1)

    async def ends(workers: int) -> tuple[list[bool], Exception | None]:
        mailbox, error = Mailbox(), UserError("said by both")
        together = await asyncio.gather(mailbox.end(error, workers), mailbox.end(error, workers))
        return list(together), await mailbox.outcome()

    for workers, together in ((2, True), (3, False)):
        found, error = asyncio.run(ends(workers))
        assert found == [together, together] and str(error) == "said by both"


def test_a_node_without_the_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run on head is not there on .*; put the run"):
        Place(tmp_path, tmp_path / "run" / ".ray", "head").enter()


def files_of_ray(session: Path) -> list[bytes]:
    found = [file.read_bytes() for file in session.rglob("*") if file.is_file()]
    assert len(found) > 10
    return found


@needs_ray
def test_two_nodes_give_the_files_of_torchrun_and_ray_sees_no_secret(
    cluster: Nodes, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same completions (samples.jsonl), curve and weights; progress on the driver."""
    import ray
    from ray._private.state import jobs
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)  # of the driver; the nodes were started without it
    run = tmp_path / "run"
    files, said = disturbed(cluster, "nothing", job(tmp_path), run, after=0)
    assert files == whole
    assert "step 0/8: held out: easy" in said and "step 8/8" in said and "first step: " in said
    assert not (run / ".ray").exists()
    assert not cluster.workers()
    recorded = files_of_ray(Path(ray._private.worker._global_node.get_session_dir_path()))
    for space in (None, b"fun", b"job", b"session", b"cluster"):
        keys = _internal_kv_list(b"", namespace=space)
        recorded += [_internal_kv_get(key, namespace=space) or b"" for key in keys]
    recorded.append(repr(jobs()).encode())
    assert str(run).encode() in recorded[-1]  # Ray keeps the command of every job
    assert not any(SECRET.encode() in each for each in recorded)


@needs_ray
@pytest.mark.parametrize("kind", ["worker", "node", "driver", "sampler"])
def test_a_loss_changes_nothing(kind: str, cluster: Nodes, whole: dict[str, str], tmp_path: Path) -> None:
    files, said = disturbed(cluster, kind, job(tmp_path), tmp_path / "run", after=2)
    assert files == whole
    assert ("a worker was lost or added" in said) == (kind != "driver")


@needs_ray
def test_workers_without_whole_weights_give_the_files_of_torchrun(cluster: Nodes, tmp_path: Path) -> None:
    """Each has a shard, samples elsewhere, and scores in turns (SORT asks for it)."""
    options = ("--set", "train.fsdp=true", "--set", "method.name=sort", "--set", "train.steps=4")
    file, run = job(tmp_path), tmp_path / "run"
    code, said = finished(cluster.train(file, run, "--samplers", "1", *options), PATIENCE)
    assert code == 0, said
    assert any(row["tokens/off_policy"] for row in lines(run / "metrics.jsonl")[1:])
    assert left_behind(run) == by_torchrun(file, tmp_path / "whole", *options)


@needs_ray
def test_a_sampler_in_bfloat16_gets_the_weights_as_it_would_round_them(
    cluster: Nodes, tmp_path: Path
) -> None:
    file, run, alone = job(tmp_path), tmp_path / "run", tmp_path / "alone"
    reduced = ("--set", "sampler.dtype=bfloat16", "--set", "train.steps=3")
    process = cluster.train(file, run, "--workers", "1", "--samplers", "1", *reduced)
    code, said = finished(process, PATIENCE)
    assert code == 0, said
    assert finished(start("train", file, "--output", alone, *reduced), PATIENCE)[0] == 0
    assert left_behind(run) == left_behind(alone)


@needs_ray
def test_workers_ask_an_endpoint_as_processes_of_torchrun_do(cluster: Nodes, tmp_path: Path) -> None:
    def planned(name: str) -> Path:
        """A run that learns from a server's plans and knows none of them yet."""
        endpoint = {"base_url": server.url, "model": "m", "cache": str(tmp_path / f"{name}.sqlite")}
        return job(tmp_path / name, method={"name": "sort", "planner": "endpoint"}, endpoint=endpoint)

    with OpenAiServer(expert) as server:
        whole = by_torchrun(planned("torchrun"), tmp_path / "torchrun/run")
        asked = len(server.requests)
        files, _ = disturbed(cluster, "nothing", planned("ray"), tmp_path / "ray/run", after=0)
    assert files == whole and len(server.requests) == 2 * asked > 0


@needs_ray
def test_a_run_goes_on_with_the_workers_that_are_left(cluster: Nodes, tmp_path: Path) -> None:
    """Three at first, then two, with the same completions as in one process without Ray."""
    file, run, alone = job(tmp_path), tmp_path / "run", tmp_path / "alone"
    process = cluster.train(file, run, "--workers", "2-3")
    wait_for(lambda: steps(run) > 2 or process.poll() is not None, PATIENCE)
    assert len(cluster.workers()) == 3
    cluster.remove(cluster.workers()[0]["Address"]["NodeID"], replace=False)
    wait_for(lambda: steps(run) > 6 or process.poll() is not None, PATIENCE)
    left = len(cluster.workers())
    cluster.add()
    code, said = finished(process, PATIENCE)
    assert code == 0 and "a worker was lost or added" in said and left == 2, said
    assert finished(start("train", file, "--output", alone), PATIENCE)[0] == 0
    assert (run / "evaluations.jsonl").read_bytes() == (alone / "evaluations.jsonl").read_bytes()
    for one, other in zip(*(lines(each / "metrics.jsonl") for each in (run, alone)), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def session(process: subprocess.Popen[str]) -> set[int]:
    """The processes that descend from one that was started in a session of its own, even if orphaned."""
    said = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,sid="], capture_output=True, text=True).stdout
    rows = [tuple(map(int, line.split())) for line in said.splitlines()]
    found = {pid for pid, _, sid in rows if sid == process.pid}
    while more := {pid for pid, parent, _ in rows if parent in found} - found:
        found |= more
    return found


@needs_ray
def test_a_local_cluster_ends_with_a_stopped_run_which_continues_without_ray(tmp_path: Path) -> None:
    """Its nodes know the secret, which is in none of Ray's files all the same."""
    file, run, alone = job(tmp_path), tmp_path / "run", tmp_path / "alone"
    records = Path(mkdtemp(prefix="ray"))  # a short path, because Ray keeps sockets there
    environment = {"RAY_ADDRESS": "", "RAY_TMPDIR": str(records), "OPENAI_API_KEY": SECRET}
    process = start("train", file, "--output", run, "--ray", environment=environment)
    wait_for(lambda: steps(run) > 2 or process.poll() is not None, PATIENCE)
    running = session(process)
    process.send_signal(signal.SIGINT)
    code, said = finished(process, PATIENCE)
    assert code == 75 and "stopped by SIGINT" in said and "Traceback" not in said, said
    assert len(running) > 3
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running), 20)
    assert not any(SECRET.encode() in each for each in files_of_ray(records))
    rmtree(records)
    code, said = finished(start("train", file, "--output", run, "--resume"), PATIENCE)
    assert code == 0, said
    code, said = finished(start("train", file, "--output", alone), PATIENCE)
    assert code == 0 and left_behind(run) == left_behind(alone), said


@needs_ray
def test_a_stop_while_the_workers_start_is_kept_for_them(cluster: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = cluster.train(job(tmp_path, train={"steps": 1000}), run)
    wait_for((run / ".ray").exists, PATIENCE)
    process.send_signal(signal.SIGINT)
    code, said = finished(process, PATIENCE)
    assert code == 75 and "stopped by SIGINT; step 0 is checkpointed" in " ".join(said.split()), said


@needs_ray
def test_a_driver_that_cannot_print_ends_the_workers(cluster: Nodes, tmp_path: Path) -> None:
    """As after ``| head``."""
    process = cluster.train(job(tmp_path, train={"steps": 1000}), tmp_path / "run")
    assert process.stdout
    while "step 0/" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    process.wait(PATIENCE)
    wait_for(lambda: not cluster.workers(), PATIENCE)
    said = (tmp_path / "run/stopped.txt").read_text()
    assert said.startswith("stopped by a failure of the driver; step ")


@needs_ray
def test_what_only_workers_notice_is_one_sentence(cluster: Nodes, tmp_path: Path) -> None:
    """It ends the run, and Ray does not start it again."""
    process = cluster.train(job(tmp_path), tmp_path / "run", "--set", "verifier.name=none.py:none")
    code, said = finished(process, PATIENCE)
    assert code == 2 and "there is no file none.py" in said and "Traceback" not in said
    assert "a worker was lost" not in said


@pytest.mark.skipif(installed, reason="Ray is installed")
def test_without_ray_the_command_says_what_to_install(handrail: Handrail, tmp_path: Path) -> None:
    done = handrail("train", str(job(tmp_path)), "--ray")
    assert done.code == 2 and 'pip install "handrail[ray]"' in done.err


def test_workers_without_ray_are_refused(handrail: Handrail, tmp_path: Path) -> None:
    done = handrail("train", str(job(tmp_path)), "--workers", "2")
    assert done.code == 2 and "start the processes with torchrun" in done.err


@needs_ray
@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", "no cluster answers"), ("ray://here:10001", "ray job submit")],
)
def test_an_address_without_a_cluster_is_one_sentence(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the module's cluster may be connected
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=expected), connection(1):
        raise AssertionError("the block was entered")
