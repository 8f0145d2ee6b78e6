"""Handrail's methods inside verl's real trainer loop, on a CPU. ``make test-verl`` runs these tests in their
own environment; without verl they are skipped."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip('verl is not installed: pip install "handrail[verl]"', allow_module_level=True)

os.environ |= {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_USE_EXTERNAL_MODULES": "tests.engines.verl_cpu",
    "VERL_LOGGING_LEVEL": "ERROR",
    "PYTHONPATH": os.getcwd(),
    "OMP_NUM_THREADS": "1",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}  # read when verl is imported

import torch
from datasets import Dataset
from hydra import compose, initialize_config_module
from verl.protocol import BatchData
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.config import validate_config

from handrail._util.errors import UserError
from handrail.data.answers import Answer, Answers, write_answers
from handrail.data.load import load
from handrail.engines import verl_limits
from handrail.engines.hosted import build_method
from handrail.engines.verl_engine import VerlPolicy
from handrail.engines.verl_rows import arrange, describe, rebuild, training_rows
from handrail.methods.scaling import scaled
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.types.trajectory import Author
from handrail.verifiers.pool import VerifierPool
from tests.conftest import HARD
from tests.engines.parity import local_gradient, norm, require_equal
from tests.engines.verl_host import CpuTrainer, Host, OnCpu, chat_model, configured, fitted


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    started = Host(configured(tmp_path_factory.mktemp("host"), method="sort"))
    yield started
    started.close()


def npo_cache(directory: Path) -> Path:
    """Answers of a later checkpoint to every problem: its reference, with made-up log-probabilities."""
    tokenizer, rows = load_model(ModelConfig(path="builtin:house-tiny"))[1], []
    for problem in load(f"{HARD}&n=32").problems:
        tokens = [*tokenizer.encode(problem.references[0]), tokenizer.eos_token_id]
        logp = [-0.1 - 0.01 * place for place in range(len(tokens))]
        rows.append(Answers(problem.id, [Answer(tokens, logp, problem.references[0])]))
    file = directory / "answers.jsonl"
    file.write_text("{}\n" + write_answers(rows))
    return file


def require_parity(run: Any) -> None:
    """Every update of ``run`` is what the local engine makes of its groups and weights."""
    kept, epochs, sizes = run.actor_rollout_wg, run.config.actor_rollout_ref.actor.ppo_epochs, []
    places = 4
    for step, guided in enumerate(run.steps, 1):
        for update in range(run.updates * epochs):
            part = [each for each in guided if each[0] * run.updates // places == update % run.updates]
            groups, at = [group for _, group in part], [place for place, _ in part]
            number = (step - 1) * run.updates * epochs + update
            model = run.config.actor_rollout_ref.model.path
            expected = local_gradient(run.method, kept.before[number], {step: (groups, at)}, 1, model=model)
            # Without credit, the gradient of a KL divergence of almost 0 is left.
            sizes.append(require_equal(kept.gradients[number], expected, rounding=1e-3))
    assert len(sizes) == len(kept.gradients) and max(sizes) > 0


PARITY = ["grpo", "luffy", "sort", "scope", "actguide", "npo", "dmpo"]


@pytest.mark.parametrize("method", PARITY)
@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_equals_the_local_engines(method: str, updates: int, host: Host, tmp_path: Path) -> None:
    """Through verl's agent loops, queue, reward loop, FSDP worker and mini-batch loop."""
    settings: dict[str, Any] = {"name": method}
    settings |= {"cache": str(npo_cache(tmp_path)), "threshold": 1.0} if method == "npo" else {}
    settings |= {"normalize_std": True} if method == "grpo" else {}  # not verl's own loss, but ours
    settings |= {"share": 1.0} if method == "actguide" else {}
    reward = "coin" if method in ("grpo", "scope", "dmpo", "npo") else "exact"
    size = f"actor_rollout_ref.actor.ppo_mini_batch_size={4 // updates}"
    run = fitted(configured(tmp_path, reward, [size], method=settings), host)
    assert len(run.actor_rollout_wg.gradients) == 2 * updates
    require_parity(run)


METHODS = ["grpo+sft", "sft", "calibrl", "int", "stride", "cso"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_through_verls_loop(method: str, host: Host, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": method} | ({"every": 1, "first": 1} if method == "stride" else {})
    run = fitted(configured(tmp_path, method=settings), host)
    assert len(run.logged) == 2
    assert any(norm(gradient.values()) > 0 for gradient in run.actor_rollout_wg.gradients)


def test_guidance_follows_rewards_and_leaves_verls_rollouts_alone(host: Host, tmp_path: Path) -> None:
    """SORT adds the reference to groups without a correct rollout, as rows of another number and length."""
    config = configured(tmp_path, "exact", method="sort")
    file = str(tmp_path / "exact.parquet")
    longer = [
        row | {"references": [f"{reference} {reference}" for reference in row["references"]]}
        for row in Dataset.from_parquet(file, cache_dir=str(tmp_path))
    ]
    Dataset.from_list(longer).to_parquet(file)
    run = fitted(config, host)
    for guided, rollouts, metrics in zip(run.steps, run.rollouts, run.logged, strict=True):
        assert len(rollouts) == 16 and metrics["critic/score/mean"] == 0.0
        assert metrics["handrail/groups/all_wrong"] == metrics["handrail/groups/guided"] == 4
        assert metrics["handrail/trajectories/trained"] == 4
        lengths = {len(row) for row in rollouts["responses"].unbind()}
        for _, group in guided:
            reference = group.trajectories[-1]
            assert reference.correct and set(reference.author.tolist()) == {Author.REFERENCE}
            assert len(group.trajectories) == 5 and len(reference) not in lengths
    assert run.calls == ["wake", "sleep", "wake", "sleep", "wake"]


def test_advantages_of_rollouts_reach_verls_metrics(host: Host, tmp_path: Path) -> None:
    run = fitted(configured(tmp_path, method={"name": "grpo", "normalize_std": False}), host)
    for guided, rollouts in zip(run.steps, run.rollouts, strict=True):
        found = sorted(round(float(row[0]), 5) for row in rollouts["advantages"].unbind())
        rewards = [[member.reward for member in group.trajectories] for _, group in guided]
        assert found == sorted(round(r - sum(group) / 4, 5) for group in rewards for r in group)


def test_luffy_samples_one_rollout_less(host: Host, tmp_path: Path) -> None:
    run = fitted(configured(tmp_path, method="luffy"), host)
    assert [len(rollouts) for rollouts in run.rollouts] == [12, 12]
    assert all(len(group.trajectories) == 4 for guided in run.steps for _, group in guided)


def test_what_a_method_samples_comes_from_verls_servers(host: Host, tmp_path: Path) -> None:
    """With the weights that sampled the rollouts, and without waking the servers twice."""
    run = fitted(configured(tmp_path, method={"name": "actguide", "share": 1.0}), host)
    assert any(member.hint for guided in run.steps for _, group in guided for member in group.trajectories)
    assert run.calls == ["wake", "sleep", "wake", "sleep", "wake"]


def test_a_step_may_take_its_problems_twice(host: Host, tmp_path: Path) -> None:
    actor = "actor_rollout_ref.actor"
    schedule = [f"{actor}.optim.lr_scheduler_type=cosine", f"{actor}.optim.lr_warmup_steps=1"]
    more = [f"{actor}.ppo_epochs=2", f"{actor}.ppo_mini_batch_size=2", *schedule]
    run = fitted(configured(tmp_path, overrides=more, method="dmpo"), host)
    assert len(run.actor_rollout_wg.gradients) == 8
    require_parity(run)
    # verl's schedule has a step for every update: its end is the end of the run.
    assert run.config.actor_rollout_ref.actor.optim.total_training_steps == 8
    assert run.actor_rollout_wg.engine.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)


def test_importance_weights_correct_for_the_servers_numbers(host: Host, tmp_path: Path) -> None:
    """The stand-in samples with the worker's weights in float32, so the weights are 1."""
    gradients = []
    for number, more in enumerate(([], ["algorithm.rollout_correction.rollout_is=token"])):
        (tmp_path / str(number)).mkdir()
        run = fitted(configured(tmp_path / str(number), overrides=more, method={"name": "grpo"}), host)
        gradients.append(run.actor_rollout_wg.gradients[0])
    difference = norm(gradients[0][name] - gradients[1][name] for name in gradients[0])
    assert norm(gradients[0].values()) > 0 and difference < 1e-3 * norm(gradients[0].values())


TWO = """
import pickle, sys
from functools import partial
from tests.engines.verl_host import OneWorker, configured
import torch
from handrail.engines.verl_rows import loss

torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
rank = torch.distributed.get_rank()
config, chunks, method = pickle.load(open(f"{sys.argv[1]}/update.pickle", "rb"))
group = OneWorker(config)
group.set_loss_fn(partial(loss, method=method, importance_weight_cap=0.0))
group.update_actor(chunks[rank])
torch.save(group.gradients[0], f"{sys.argv[1]}/{rank}.pt")
"""


OWN = """
from handrail import Method

class Own(Method):
    name = "own"

    def surrogate(self, logp, batch):  # reads everything that it may read
        return super().surrogate(logp, batch) * self.group_size / self.max_tokens * self.settings.clip_low
"""


def test_two_processes_make_one_update(host: Host, tmp_path: Path) -> None:
    """Each trains on its part of the rows, as verl splits them, in another directory than the trainer.

    The method is from a file of one's own, which the workers find although its path is relative.
    """
    (tmp_path / "own.py").write_text(OWN)
    name = f"{os.path.relpath(tmp_path / 'own.py')}:Own"
    run = fitted(configured(tmp_path, method={"name": name, "clip_low": 0.5}), host)
    require_parity(run)
    run.engine.begin(1)
    credited = run.engine.credit(run.method, [group for _, group in run.steps[0]])
    live = [sample for sample in scaled(run.method, credited) if sample.is_live]
    rows = arrange(live, processes=2, size=4, end=1)
    named = {"temperature": 1.0, "mini_batch_size": len(rows), "global_batch_size": len(rows), "epochs": 1}
    parts = BatchData(training_rows(rows, **named, seed=1, calculate_entropy=False)).chunk(chunks=2)
    update = (run.config.actor_rollout_ref, parts, describe(run.method))
    (tmp_path / "update.pickle").write_bytes(pickle.dumps(update))
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        require_equal(torch.load(tmp_path / f"{rank}.pt"), run.actor_rollout_wg.gradients[0])


def test_workers_build_a_method_from_settings_alone(tmp_path: Path) -> None:
    cache = npo_cache(tmp_path)
    given = build_method({"name": "npo", "cache": str(cache), "dual_clip": 3.0}, ["pacr"], 4, 48)
    cache.unlink()
    built = rebuild(describe(given))
    assert (built.name, built.group_size, built.max_tokens, built.terms) == ("npo", 4, 48, ())
    assert built.settings.dual_clip == 3.0
    assert rebuild(describe(build_method({"clip_low": 0.1}, [], 4, 48))).name == "grpo"


TERMS: list[list[Any]] = [
    [{"name": "ace", "alpha": 1.0}],
    ["arm", "imentor"],
    [{"name": "pacr", "answer_template": " # {answer}"}],
]


@pytest.mark.parametrize("number", range(len(TERMS)))
def test_terms_work_under_a_method(number: int, host: Host, tmp_path: Path) -> None:
    one = ["trainer.total_training_steps=1"]  # because the state of a term changes with every step
    run = fitted(configured(tmp_path, "coin", one, method="sort", terms=TERMS[number]), host)
    require_parity(run)


def test_handrails_verifier_replaces_verls_rewards(host: Host, tmp_path: Path) -> None:
    """Also for terms that read answers, which verl's rewards do not tell."""
    verifier = {"name": "exact", "extract": r"# ([\d ]+)$", "workers": 1}
    named: dict[str, Any] = {"method": "luffy", "terms": [{"name": "olr", "start": 0, "slope": -1.0}]}
    run = fitted(configured(tmp_path, "coin", verifier=verifier, **named), host)
    assert len(run.method.terms[0].state()["passes"]) == 8
    assert not any(m.correct for guided in run.steps for _, group in guided for m in group.rollouts)
    with pytest.raises(UserError, match=r"add \+algorithm.handrail.verifier=math"):
        fitted(configured(tmp_path, "coin", **named), host)


def test_grpo_without_anything_is_verls_own(host: Host, tmp_path: Path) -> None:
    class Verls(OnCpu):
        pass

    gradients = []
    for cls, mode, estimator in ((Verls, "sync", "grpo"), (CpuTrainer, "handrail", "handrail")):
        (tmp_path / mode).mkdir()
        own = [f"trainer.v1.trainer_mode={mode}", f"algorithm.adv_estimator={estimator}"]
        run = fitted(configured(tmp_path / mode, overrides=own, method="grpo"), host, cls)
        gradients.append(run.actor_rollout_wg.gradients)
    for one, other in zip(*gradients, strict=True):
        assert norm(one.values()) > 0
        assert norm(one[name] - other[name] for name in one) <= 1e-5 * norm(one.values())


def test_a_resumed_run_goes_on_with_the_methods_state(host: Host, tmp_path: Path) -> None:
    changes = ["trainer.save_freq=1", "trainer.total_training_steps=1"]
    saved = fitted(configured(tmp_path, overrides=changes, method="sort", terms=["imentor"]), host)
    folder = tmp_path / "checkpoints/global_step_1"
    resumed = [f"trainer.resume_from_path={folder}", "trainer.resume_mode=resume_path"]
    run = fitted(configured(tmp_path, overrides=resumed, method="sort", terms=["imentor"]), host, Restored)
    assert len(run.logged) == 1
    one, other = saved.method.terms[0].state(), run.restored[0]
    assert one["nets"].keys() == other["nets"].keys()
    assert all(torch.equal(one["nets"][name], other["nets"][name]) for name in one["nets"])
    (folder / "handrail.json").unlink()
    with pytest.raises(UserError, match="another trainer wrote it"):
        fitted(configured(tmp_path, overrides=resumed, method="sort"), host)


class Restored(CpuTrainer):
    """Keeps the state that was restored."""

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.restored = copy.deepcopy([term.state() for term in self.method.terms])


def test_a_step_is_scored_and_graded_in_one_call_each(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts of all its problems: a call to verl's workers is padded and waits for all of them."""
    asked: list[tuple[str, int]] = []

    def count(owner: type, name: str) -> None:
        answer = getattr(owner, name)

        def counted(self: Any, rows: Any, *rest: Any, **named: Any) -> Any:
            asked.append((name, len(rows)))
            return answer(self, rows, *rest, **named)

        monkeypatch.setattr(owner, name, counted)

    count(VerlPolicy, "score")
    count(VerifierPool, "grade")
    settings: dict[str, Any] = {"method": {"name": "grpo"}, "verifier": {"name": "exact", "workers": 1}}
    fitted(configured(tmp_path, "coin", ["actor_rollout_ref.actor.ppo_mini_batch_size=2"], **settings), host)
    assert asked == [("grade", 16), ("score", 16)] * 2


CORRECTION = "algorithm.rollout_correction"
SILENT = "actor_rollout_ref.rollout.calculate_log_probs=false"
REFUSALS: list[tuple[list[str], dict[str, Any], str]] = [
    (["algorithm.adv_estimator=grpo"], {}, "adv_estimator is grpo, so verl would ignore algorithm"),
    ([], {"methods": "sort"}, r"no setting algorithm.handrail.methods; did you mean 'method'"),
    ([], {"method": "sorted"}, "there is no method 'sorted'; did you mean 'sort'"),
    ([], {"method": "autonpo"}, "autonpo goes back to earlier checkpoints, which verl cannot"),
    (
        [],
        {"method": {"name": "stride", "judge": "critic"}},
        "stride trains a critic beside the policy, which verl cannot",
    ),
    ([], {"method": "tgpo"}, "verl's trainer process has no GPU to run a teacher on"),
    (["algorithm.filter_groups.enable=true"], {}, "drops groups before sort or one of its terms sees them"),
    (["actor_rollout_ref.actor.use_kl_loss=true"], {}, "use_kl_loss is True, .* set kl in"),
    (["actor_rollout_ref.actor.clip_ratio_high=0.28"], {}, "leave it out and set clip_high in"),
    (["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"], {}, "and set loss_normalizer in"),
    (["algorithm.gamma=0.9"], {}, "gamma is 0.9, but the objective is that of sort; leave it out$"),
    (["algorithm.rollout_correction.bypass_mode=true"], {}, "bypass_mode is True, but with sort the ratio"),
    (["algorithm.rollout_correction.rollout_is=sequence"], {}, "tokens are weighted one by one"),
    (
        [f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_2.0"],
        {},
        "have an upper bound only; give one number",
    ),
    ([SILENT], {"method": "actguide"}, "return no log-probabilities, which actguide needs; leave it out"),
    ([SILENT], {"terms": ["arm"]}, "return no log-probabilities, which arm needs"),
    ([SILENT, f"{CORRECTION}.rollout_is=token"], {}, "which algorithm.rollout_correction.rollout_is needs"),
    (["actor_rollout_ref.rollout.multi_turn.enable=true"], {}, "with sort completions have a single turn"),
    (["actor_rollout_ref.actor.strategy=megatron"], {}, "but sort needs fsdp or fsdp2; set it to"),
    (["critic.enable=true"], {}, "sort has no critic"),
    (["reward.reward_model.enable=true"], {}, "set reward.reward_model.enable_resource_pool=True"),
    (["actor_rollout_ref.actor.ppo_mini_batch_size=3"], {}, "make the first a multiple of the second"),
    (
        ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=null"],
        {"method": {"name": "sort", "kl": 0.1}},
        "is missing; set it, because sort asks the model before training",
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_what_a_method_cannot_do_inside_verl_is_refused_at_once(number: int, tmp_path: Path) -> None:
    overrides, section, sentence = REFUSALS[number]
    with pytest.raises(UserError, match=sentence):
        CpuTrainer(configured(tmp_path, "exact", overrides, **{"method": "sort"} | section))


def test_prompts_that_verl_writes_otherwise_are_refused(host: Host, tmp_path: Path) -> None:
    """The agent loops run with the host's configuration, without this argument of the template."""
    other = ["+data.apply_chat_template_kwargs.last=A"]
    with pytest.raises(UserError, match="verl writes its prompt with other tokens .* raise data.max_prompt"):
        fitted(configured(tmp_path, "exact", other, method="sort"), host)


def test_no_other_trainer_runs_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs Handrail's trainer; set trainer.v1.trainer_mode=handrail"):
        get_adv_estimator_fn("handrail")(token_level_rewards=None, response_mask=None)
    mode = configured(tmp_path, "exact", method="sort")
    assert CpuTrainer(mode).trainer_mode == "sync"


def test_verls_command_refuses_a_method_that_its_own_trainer_would_ignore(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "+algorithm.handrail.method=sort"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=200, cwd=tmp_path)
    sentence = (
        "trainer.v1.trainer_mode is sync and algorithm.adv_estimator is gae, so verl would ignore "
        "algorithm.handrail; set trainer.v1.trainer_mode=handrail algorithm.adv_estimator=handrail\n"
    )
    assert done.returncode != 0 and sentence in done.stderr, done.stderr[-2000:]
    assert "ray init" not in done.stdout


def test_verl_finds_the_trainer_through_its_entry_point() -> None:
    code = "import verl.trainer.ppo.v1 as v1; print(v1.get_trainer_cls('handrail').__name__)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=200
    )
    assert "GuidedPPOTrainer" in done.stdout, done.stderr[-2000:]


def test_another_version_of_verl_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """verl hides what a plugin raises, so the plugin says it itself."""
    verl_limits.require_tested()
    with pytest.raises(UserError, match=r"in verl 0.10.0 nothing has been tested; pip install \"verl==0.9.1"):
        verl_limits.require_tested("0.10.0")
    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, batch: batch)
    monkeypatch.delattr(PPOTrainer, "_fetch_one_gen_batch")
    sentence = "in verl 0.9.1 PPOTrainer._fetch_one_gen_batch, PPOTrainer._balance_batch changed; pip install"
    with pytest.raises(UserError, match=sentence):
        verl_limits.require_tested()
    for module in ("handrail.engines.verl", "handrail.engines.verl_plugin"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError):
        importlib.import_module("handrail.engines.verl_plugin")
    assert f"handrail: handrail.engines.verl builds on verl 0.9.1, and {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(Path("examples/verl").glob("*.sh")), ids=lambda path: path.stem)
def test_the_examples_command_lines_are_valid(script: Path, tmp_path: Path) -> None:
    """As far as verl checks a configuration before it asks for GPUs."""
    words = shlex.split(re.sub(r"\\\n", " ", script.read_text()), comments=True)
    given = [word for word in words[words.index("verl.trainer.main_ppo") + 1 :] if word != "$@"]
    model = chat_model(tmp_path)
    given = [f"actor_rollout_ref.model.path={model}" if "model.path=" in word else word for word in given]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=given)
    validate_config(config, need_reference_policy(config), need_critic(config))
    settings = verl_limits.settings_of(config)
    rollout = config.actor_rollout_ref.rollout
    verl_limits.require_possible(build_method(settings.method, settings.terms, rollout.n, 1024), config)
    assert config.trainer.nnodes * config.trainer.n_gpus_per_node == int(re.findall(r"\d+", script.stem)[-1])
