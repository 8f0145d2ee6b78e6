"""``handrail model blend``: the mean of two models' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.blending.__main__ import PAGE, rendered
from handrail import TrainablePolicy, train
from handrail.models.builtin import locate
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model
from handrail.training.blend import blend
from handrail.training.config import load_config
from handrail.training.trained import KEPT
from tests.cli.test_commands import assert_refused
from tests.conftest import EASY, Handrail, config
from tests.tiny_models import save_chat_model

START = "builtin:house-tiny"


def weights(model: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(locate(str(model))) / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(config(data={"train": f"{EASY}&n=16"}, method={"name": "sft"}, train={"steps": 2}), directory)
    return directory


def test_weights_by_hand(tmp_path: Path) -> None:
    """share 0.8 of weights -1 and 3: 0.2·(-1) + 0.8·3 = 2.2; tied weights are averaged once."""
    for name, value in (("start", -1.0), ("end", 3.0)):
        policy = TrainablePolicy(str(save_chat_model(tmp_path / "chat")))
        with torch.no_grad():
            for weight in policy.bare_model.parameters():
                weight.fill_(value)
        policy.save(tmp_path / name)
        # As published models do; transformers refuses to save it.
        (tmp_path / name / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 0}')
    blend(str(tmp_path / "start"), str(tmp_path / "end"), 0.8, tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == weights(tmp_path / "end").keys()
    assert all(torch.allclose(value, torch.tensor(2.2)) for value in found.values())


def test_a_run_is_blended_with_its_start_and_trained_on(run: Path, tmp_path: Path) -> None:
    start, end = weights(START), weights(run / "model")
    assert any(not torch.equal(start[name], end[name]) for name in end)
    for share, same in ((0.0, start), (1.0, end)):
        blend(START, str(run / "model"), share, tmp_path / str(share))
        found = weights(tmp_path / str(share))
        assert found.keys() == end.keys() and all(torch.equal(found[name], same[name]) for name in end)
    blend(START, str(run / "model"), 0.25, tmp_path / "quarter")
    for name, value in weights(tmp_path / "quarter").items():
        expected = 0.75 * start[name].double() + 0.25 * end[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert load_config(tmp_path / "quarter" / KEPT).method["name"] == "sft"  # eval grades as the run did
    train(config(model={"path": str(tmp_path / "quarter")}, train={"steps": 1}), tmp_path / "on")


def test_an_adapter_is_blended_like_any_model(tmp_path: Path) -> None:
    """With share 0.5, half of what the adapter adds remains."""
    settings = config(
        data={"train": f"{EASY}&n=16"}, method={"name": "sft"}, lora={"rank": 2}, train={"steps": 1}
    )
    train(settings, tmp_path / "run")
    adapter = tmp_path / "run/model"
    assert (adapter / "adapter_model.safetensors").is_file()
    blend(START, str(adapter), 0.5, tmp_path / "half")
    whole = load_model(ModelConfig(path=str(adapter)))[0].state_dict()  # merged in float32
    start, half = weights(START), weights(tmp_path / "half")
    assert any(not torch.equal(start[name].float(), whole[name]) for name in half)
    for name, value in half.items():
        torch.testing.assert_close(value, (start[name].float() + whole[name]) / 2)


def test_what_cannot_be_blended_is_one_sentence(run: Path, handrail: Handrail, tmp_path: Path) -> None:
    other, out = save_chat_model(tmp_path / "chat"), tmp_path / "out"
    done = handrail("model", "blend", str(other), str(run), "--output", str(out))
    assert_refused(done, "was not trained from", "name the model that the training started from", output=out)
    done = handrail("model", "blend", str(tmp_path / "none"), str(run), "--output", str(out))
    assert_refused(done, "START: ", "none", output=out)
    done = handrail("model", "blend", START, str(run), "--output", str(other))
    assert_refused(done, "already exists; choose another --output", output=out)
    done = handrail("model", "blend", START, str(run), "--output", str(out))
    assert done.code == 0 and weights(out)


def test_a_model_that_was_trained_from_another_one_is_blended_with_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blend(START, str(run / "model"), 0.5, tmp_path / "own")
    blend(str(run / "model"), str(tmp_path / "own"), 0.5, tmp_path / "again")  # the same start, on the way
    assert not caplog.text
    other = TrainablePolicy(START)
    with torch.no_grad():
        for weight in other.bare_model.parameters():
            weight.add_(0.1)
    other.save(tmp_path / "other")
    blend(str(tmp_path / "other"), str(run / "model"), 0.5, tmp_path / "mixed")
    assert f"was trained from {START}, not from {tmp_path / 'other'}" in caplog.text


def test_the_page_of_the_benchmark_follows_from_its_results() -> None:
    assert rendered() == PAGE.read_text(encoding="utf-8")
