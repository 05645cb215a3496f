"""Tests of models named as on the Hugging Face Hub, with a fake hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from engine import EngineConfig
from engine.config import BUILTIN_DIR, HubError
from engine.models import read_model
from engine.weights.hub import display_name, resolve_config, resolve_folder
from tests.refused import refused

NAME, COMMIT = "some-org/Tiny-Model", "a" * 40
WEIGHTS = (BUILTIN_DIR / "model.safetensors").read_bytes()
CONFIG = (BUILTIN_DIR / "config.json").read_bytes()
OTHERS = {
    "model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}}',
    "consolidated.safetensors.index.json": b'{"weight_map": {"a": "consolidated.safetensors"}}',
    "consolidated.safetensors": b"\0" * 100,
    "original/model.safetensors": b"\0" * 100,
    "chat_template.jinja": b"{{ messages }}",
}


@dataclass
class Hub:
    """Fake hub: the files of one repository, and its faults."""

    files: dict[str, bytes] = field(
        default_factory=lambda: {"config.json": CONFIG, "model.safetensors": WEIGHTS, **OTHERS}
    )
    refusal: tuple[int, str] | None = None
    """Status and error code of every answer, or None to serve."""
    architecture: str = "qwen35"
    """That of the repository's GGUF files."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    sent_bytes: int = 0
    url: str = ""

    def downloads(self) -> set[str]:
        marker = f"/resolve/{COMMIT}/"
        return {
            path.split(marker)[1]
            for verb, path in self.requests
            if verb == "GET" and marker in path
        }


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            if hub.refusal is not None:
                return self._refuse(*hub.refusal)
            if not path.startswith((f"/api/models/{NAME}", f"/{NAME}/")):
                return self._refuse(404, "RepoNotFound")
            if path.startswith("/api/"):
                rest = path.removeprefix(f"/api/models/{NAME}").strip("/").split("/")
                if rest[0] == "revision" and rest[1] not in ("main", "v1", COMMIT):
                    return self._refuse(404, "RevisionNotFound")
                named = sorted(hub.files.items())
                if "expand=gguf" in self.path:
                    return self._send({"id": NAME, "gguf": {"architecture": hub.architecture}})
                if rest[0] == "tree":
                    return self._send([self._entry(*one) for one in named])
                siblings = [{"rfilename": name, "size": len(data)} for name, data in named]
                return self._send({"id": NAME, "sha": COMMIT, "siblings": siblings})
            name = path.split(f"/resolve/{COMMIT}/")[1]
            tag = f'"{hashlib.sha1(hub.files[name]).hexdigest()}"'
            self._send(hub.files[name], headers={"X-Repo-Commit": COMMIT, "ETag": tag})
            if self.command == "GET":
                hub.sent_bytes += len(hub.files[name]) * name.endswith((".safetensors", ".gguf"))

        @staticmethod
        def _entry(name: str, data: bytes) -> dict[str, object]:
            oid = hashlib.sha1(data).hexdigest()
            return {"type": "file", "path": name, "size": len(data), "oid": oid}

        def _refuse(self, status: int, code: str) -> None:
            self._send(b"", status, {"X-Error-Code": code})

        def _send(
            self, content: object, status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            """Send bytes as they are, and other contents as JSON."""
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Start a hub that this process uses, with an empty cache."""
    from huggingface_hub import constants

    served = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
    waits = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("huggingface_hub.file_download.time", waits)
    monkeypatch.setattr("huggingface_hub.utils._http.time", waits)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_the_needed_files_of_a_model_are_downloaded_once(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve_config(EngineConfig(model=NAME, revision="v1", device="cpu"), read_model)
    folder = Path(config.model or "")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    names = "config.json", "model.safetensors", "chat_template.jinja"
    assert hub.downloads() == {*names, "model.safetensors.index.json"}
    assert display_name(folder) == NAME and config.revision is None
    [line] = [one for one in capsys.readouterr().err.splitlines() if "Downloading" in one]
    assert f"Downloading {NAME} (commit aaaaaaaa)" in line and "in 1 file" in line
    hub.requests.clear()
    again = resolve_config(EngineConfig(model=NAME, revision="v1"), read_model)
    assert (again.model, hub.downloads()) == (config.model, set())
    assert "Downloading" not in capsys.readouterr().err


def test_an_unsupported_model_or_proxy_is_refused_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session

    hub.files["config.json"] = b'{"model_type": "whisper"}'
    with pytest.raises(HubError, match=f"{NAME} is not downloaded: .*'whisper'"):
        resolve_config(EngineConfig(model=NAME), read_model)
    assert hub.sent_bytes == 0
    close_session()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # Its package is not installed.
    refused("other/model", resolve_folder, "other/model", kind=HubError)


GGUF_FILES = {
    ".gitattributes": b"*.gguf",
    "mmproj-F16.gguf": b"GGUF of images",
    "Tiny-Q4_K_M.gguf": b"GGUF four bits",
    "BF16/Tiny-BF16-00001-of-00002.gguf": b"GGUF one",
    "BF16/Tiny-BF16-00002-of-00002.gguf": b"GGUF two",
}


@pytest.mark.parametrize(
    ("label", "expected"),
    [("", ["Tiny-Q4_K_M.gguf"]), (":q4_k_m", ["Tiny-Q4_K_M.gguf"]), (":BF16", [*GGUF_FILES][3:])],
)
def test_only_the_chosen_gguf_files_are_downloaded_once(
    label: str, expected: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the repository has a config.json, and without the hub once they are in the cache."""
    hub.files = GGUF_FILES | ({"config.json": CONFIG} if label else {})
    small = {"config.json", ".gitattributes"}
    config = EngineConfig(model=NAME + label, revision="v1", device="cpu")
    found = Path(resolve_config(config, read_model).model or "")
    assert found.read_bytes() == GGUF_FILES[expected[0]]
    assert hub.downloads() - small == {*expected}
    assert display_name(found) == f"{NAME}:{label[1:].upper() or 'Q4_K_M'}"
    [line] = capsys.readouterr().err.splitlines()
    assert f"(commit aaaaaaaa): {sum(len(GGUF_FILES[name]) for name in expected)} B in" in line
    hub.requests.clear()
    assert resolve_config(config, read_model).model == str(found)
    hub.refusal = 503, ""
    assert resolve_config(config, read_model).model == str(found)
    assert hub.downloads() == set()
    with pytest.raises(HubError, match=r"0 models with the format Q8_0: choose one of .*Tiny-"):
        resolve_folder(f"{NAME}:Q8_0", revision="v1")


def test_gguf_files_of_an_unsupported_architecture_are_not_downloaded(hub: Hub) -> None:
    hub.files, hub.architecture = GGUF_FILES, "llama"
    with pytest.raises(HubError, match=f"{NAME} is not downloaded: .*'llama' in {NAME} are not"):
        resolve_folder(NAME)
    assert hub.sent_bytes == 0


def test_models_are_listed_if_none_is_the_usual_one(hub: Hub) -> None:
    hub.files = GGUF_FILES | {"Tiny-Q8_0.gguf": b"GGUF"}
    del hub.files["Tiny-Q4_K_M.gguf"]
    with pytest.raises(HubError) as error:
        resolve_folder(NAME)
    choices = "BF16/Tiny-BF16-00001-of-00002.gguf, Tiny-Q8_0.gguf"
    assert str(error.value) == (
        f"{NAME} has several models: choose one of {choices}, and write its format or name "
        f"after {NAME}:"
    )
    assert hub.sent_bytes == 0


def test_repositories_without_weights_are_refused(hub: Hub) -> None:
    hub.files = {"README.md": b"", "config.json": CONFIG}
    with pytest.raises(HubError, match=f"{NAME} has neither .safetensors files with .* nor GGUF"):
        resolve_folder(NAME, read_model)


@pytest.mark.full
def test_cached_models_are_used_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be loaded .* \(.*offline mode"):
        resolve_config(EngineConfig(model=NAME), read_model)
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    small = resolve_folder(NAME)
    assert "model.safetensors" not in os.listdir(small)
    hub.refusal = 503, ""
    with pytest.raises(HubError, match=r"cannot be loaded from http.* \(.*503"):
        resolve_config(EngineConfig(model=NAME), read_model)
    assert resolve_folder(NAME) == small
    hub.refusal = None
    whole = resolve_config(EngineConfig(model=NAME), read_model).model
    hub.refusal = 503, ""
    assert resolve_config(EngineConfig(model=NAME), read_model).model == whole
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_config(EngineConfig(model=NAME), read_model).model == whole
    with pytest.raises(HubError, match=r"cannot be loaded .*: check the name"):
        resolve_config(EngineConfig(model="other/model"), read_model)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "use --model Qwen/Qwen3-0.6B."),
        ("s3://bucket/model", "is a URL"),
        ("qwen3:0.6b", "name of Ollama's library"),
        ("org/qwen3:latest", "name of Ollama's library"),
    ],
)
def test_names_of_other_programs_are_refused_in_one_sentence(model: str, said: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve_folder(model)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_an_adapter_is_refused_and_a_merged_model_with_its_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match=r"adapter .LoRA., which is not supported: merge it"):
        resolve_folder(str(tmp_path))
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert resolve_folder(str(tmp_path)) == str(tmp_path)
