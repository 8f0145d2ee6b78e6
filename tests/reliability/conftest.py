from __future__ import annotations

import pytest

from tests.forks import start
from tests.reliability.processes import finished, job, left_behind


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed run of ``job``."""
    directory = tmp_path_factory.mktemp("whole")
    code, said = finished(start("train", job(directory), "--output", directory / "run"))
    assert code == 0, said
    return left_behind(directory / "run")
