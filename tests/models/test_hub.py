"""Names that are no model and no data set, with a hub that says so and with a hub that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from handrail import UserError
from handrail.data.load import load_problems
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model


@pytest.fixture(params=["missing", "silent"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The behavior of the hub, and the paths that were requested."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            if request.param == "silent":  # cuts the connection
                self.close_connection = True
                return
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield request.param, asked
    server.shutdown()
    server.server_close()


def model() -> None:
    load_model(ModelConfig(path="someone/something", device="cpu"))


def data() -> None:
    load_problems("someone/something")


@pytest.mark.parametrize(("load", "kind"), [(model, "model"), (data, "dataset")])
def test_an_unknown_name_is_looked_up_once_and_the_reason_is_reported(
    load: Callable[[], None], kind: str, hub: tuple[str, list[str]]
) -> None:
    does, asked = hub
    start = time.monotonic()
    with pytest.raises(UserError) as refused:
        load()
    assert time.monotonic() - start < 10 and sum("someone" in path for path in asked) == 1
    if does == "missing":
        assert (
            f"no file or directory someone/something, and the Hugging Face hub shows no {kind} of that name"
            in str(refused.value)
        )
    else:
        assert "onnect" in str(refused.value) or "reach" in str(refused.value)
        assert "no directory of that name" in str(refused.value) or "no such file" in str(refused.value)
