"""What TRL's and verl's engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from handrail._util.errors import UserError
from handrail.engines.hosted import build_method, problem_of
from handrail.models.trainable import TrainablePolicy


def test_a_configuration_moves_from_host_to_host(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[model]\npath = "m"\n[method]\nname = "sort"\nalpha = 0.7\nterms = [{name = "pacr"}]\n')
    method = build_method(str(file), [{"name": "ace", "alpha": 1.0}], group_size=4, max_tokens=48)
    assert (method.name, method.settings.alpha, method.group_size, method.max_tokens) == ("sort", 0.7, 4, 48)
    assert [term.name for term in method.terms] == ["pacr", "ace"]


@pytest.mark.parametrize("ids", [{}, {"id": None}])
def test_a_row_without_an_id_gets_its_own(ids: dict[str, None], policy: TrainablePolicy) -> None:
    rows = [{"prompt": "a", "answer": "1", **ids}, {"prompt": "b", "answer": "1", **ids}]
    first, other = (problem_of(row, policy.renderer).id for row in rows)
    assert first != other and "None" not in (first, other)
    assert problem_of({**rows[0], "id": 0}, policy.renderer).id == "0"


def test_a_configuration_without_a_method_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    with pytest.raises(UserError, match=r"config.toml cannot be read \(.*No such file"):
        build_method(str(file), [], 4, 48)
    file.write_text("[method\n")
    with pytest.raises(UserError, match="cannot be read .* give a configuration in TOML"):
        build_method(str(file), [], 4, 48)
    file.write_text("[model]\n")
    with pytest.raises(UserError, match=r"has no section \[method\]; add one"):
        build_method(str(file), [], 4, 48)
