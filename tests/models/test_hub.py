"""Names that are no model and no data set, with a hub that says so and with a hub that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from handrail import UserError
from handrail._util.hub import look_up
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
    load: Callable[[], None], kind: str, hub: tuple[str, list[str]], caplog: pytest.LogCaptureFixture
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
        assert constants.HF_HUB_OFFLINE
        assert "the Hugging Face hub cannot be reached (RemoteProtocolError: " in caplog.text


@pytest.mark.parametrize(
    ("error", "offline"),
    [(TimeoutError("slow"), True), (OfflineModeIsEnabled("off"), False), (TypeError("a bug"), False)],
)
def test_only_a_lack_of_connection_turns_the_process_offline(
    error: Exception, offline: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "repo_info", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TypeError) if isinstance(error, TypeError) else nullcontext():
        look_up("someone/something", "model", "model.path")
    assert constants.HF_HUB_OFFLINE is offline
    assert ("cannot be reached (TimeoutError: slow)" in caplog.text) is offline
