"""Finding a model: local folders, and a hub served on this machine."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from megatron.bridge.conversion.hf import HFFolderError, HFSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "f" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def repository() -> dict[str, bytes]:
    weight_map = {"a": SHARDS[0], "b": SHARDS[1]}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        SHARDS[0]: save({"a": torch.ones(3)}),
        SHARDS[1]: save({"b": torch.zeros(2)}),
        # The same weights a second time, as some repositories have them.
        "consolidated.safetensors": save({"a": torch.ones(3), "b": torch.zeros(2)}),
    }


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as fetching a snapshot uses."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if "gated" in path:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/tiny/llama/revision/"):
            revision = path.rsplit("/", 1)[1]
            sha = {"main": COMMIT, "old": OLD_COMMIT, COMMIT: COMMIT}.get(revision)
            if sha is None:
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": name} for name in self.files]
                self.reply_json({"id": "tiny/llama", "sha": sha, "siblings": siblings})
        elif path.startswith("/api/models/tiny/llama/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            self.reply_json(entries)
        elif path.startswith("/tiny/llama/resolve/"):
            _, _, _, _, commit, name = path.split("/", 5)
            content = self.files[name]
            if with_body:
                self.fetched.append(name)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.reply(200, content if with_body else b"", {"ETag": etag, "X-Repo-Commit": commit}, len(content))
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with one model, and an empty cache."""
    Hub.files, Hub.fetched = repository(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield Hub
    server.shutdown()
    server.server_close()


def test_local_folder(tmp_path: Path) -> None:
    for name, content in repository().items():
        if name != "consolidated.safetensors":
            (tmp_path / name).write_bytes(content)
    source = HFSource(tmp_path)
    assert source.is_local
    assert source.folder == tmp_path
    assert sorted(source.weights) == ["a", "b"]
    assert source.weights is source.weights


def test_hub_gives_weights_only_when_they_are_used(hub: type[Hub]) -> None:
    source = HFSource("tiny/llama")
    assert not source.is_local
    assert json.loads((source.folder / "config.json").read_text()) == {"architectures": ["LlamaForCausalLM"]}
    assert sorted(hub.fetched) == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert source.weights.read("a").tolist() == [1.0, 1.0, 1.0]
    assert sorted(hub.fetched[3:]) == list(SHARDS)


def test_weights_are_of_the_same_commit_as_the_configuration(hub: type[Hub]) -> None:
    source = HFSource("tiny/llama", revision="old")
    assert source.folder.name == OLD_COMMIT
    assert source.weights.folder == source.folder


def test_single_file_from_the_hub(hub: type[Hub]) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": save({"a": torch.ones(3)})}
    assert list(HFSource("tiny/llama").weights) == ["a"]


def test_pickled_weights_of_the_hub_are_not_fetched(hub: type[Hub]) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(HFFolderError, match="no weights"):
        HFSource("tiny/llama").weights  # noqa: B018
    assert hub.fetched == ["config.json"]


def test_cache_serves_without_a_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    HFSource("tiny/llama").folder  # noqa: B018
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = HFSource("tiny/llama")
    assert source.folder.name == COMMIT
    # Older hub clients hand out the incomplete snapshot, in which the missing shards are then found.
    with pytest.raises(HFFolderError, match=rf"(?s)lacks.*{SHARDS[0]}"):
        source.weights  # noqa: B018
    with pytest.raises(HFFolderError, match=r"'tiny/other' is no folder here, .* give a local folder"):
        HFSource("tiny/other").folder  # noqa: B018


@pytest.mark.parametrize(
    ("name", "revision", "culprit"),
    [
        ("tiny/other", None, "'tiny/other' is neither a folder here nor on the hub"),
        ("tiny/llama", "gone", "'tiny/llama' at revision 'gone' is not on the hub"),
        ("tiny/gated", None, "'tiny/gated' is gated: .*HF_TOKEN"),
        ("tiny llama", None, "'tiny llama' is neither a folder here nor a valid hub id"),
    ],
)
def test_what_the_hub_refuses_is_reworded(hub: type[Hub], name: str, revision: str | None, culprit: str) -> None:
    with pytest.raises(HFFolderError, match=culprit) as caught:
        HFSource(name, revision).folder  # noqa: B018
    assert caught.value.__cause__ is not None


@pytest.mark.usefixtures("hub")
def test_hub_model_without_config_is_refused(hub: type[Hub]) -> None:
    hub.files = {"tokenizer.json": b"{}"}
    with pytest.raises(HFFolderError, match=r"'tiny/llama' has no config\.json"):
        HFSource("tiny/llama").folder  # noqa: B018


def test_wrong_local_folders(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(HFFolderError, match=r"there is no folder .*/lama; did you mean 'llama'"):
        HFSource(tmp_path / "lama").folder  # noqa: B018
    with pytest.raises(HFFolderError, match="there is no folder"):
        HFSource("./nowhere").folder  # noqa: B018
    with pytest.raises(HFFolderError, match="is a file"):
        HFSource(tmp_path / "file").folder  # noqa: B018
    with pytest.raises(HFFolderError, match=r"llama has no config\.json"):
        HFSource(tmp_path / "llama").folder  # noqa: B018
    with pytest.raises(HFFolderError, match="has no revision 'main'"):
        HFSource(tmp_path / "llama", revision="main").folder  # noqa: B018


def test_configuration_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from megatron.bridge.conversion.hf import HFSource, companion_files; "
        f"companion_files(HFSource({str(tmp_path)!r}).folder); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
