from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def forked_verifiers() -> None:
    """Verifiers start as users' do."""
