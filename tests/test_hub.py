"""Bases of the hub, against a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.attachment.pure import fresh
from lorafit.bases import progress
from lorafit.bases.base import open_base, open_outline
from lorafit.cli import main
from lorafit.errors import BaseError
from lorafit.jobs import doctor
from lorafit.jobs.show import shown

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
TINY = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Repositories by id: commits by hash, each a dict of files; branches by name. Remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches = {"main": NEW, "v1": OLD}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.breaks_off_after: int | None = None  # bytes of weights, once

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files_asked(self) -> list[str]:
        return [asked.split("/")[-1] for asked in self.asked if "/resolve/" in asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            name, _, revision = path.removeprefix("api/models/").partition("/revision/")
        else:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
        commits = self.server.repositories.get(name)
        if commits is None:
            return self.refuse(401, "RepoNotFound")
        commit = self.server.branches.get(revision, revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        files = commits[commit]
        if path.startswith("api/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), {})
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send(
            200, files[file], {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
        )

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.breaks_off_after
        if cut is not None and len(data) > cut:
            self.wfile.write(data[:cut])
            self.close_connection = True
            return
        self.wfile.write(data)


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, whose branch v1 differs from main in a weight, and an empty cache to fetch it into."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    new = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    weights = new["model.safetensors"]
    old = {**new, "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
    spice = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"raise SystemExit",
        "onnx/model.onnx": b"x",
        "README.md": b"",
    }
    server.repositories[TINY] = {NEW: {**new, **spice}, OLD: {**old, **spice}}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield server
    server.shutdown()
    server.server_close()


def opened(name: str, told: list[str] | None = None, seen: list[tuple[str, int, int, str]] | None = None) -> Any:
    return open_base(
        name,
        torch.float32,
        (told if told is not None else []).append,
        lambda *moment: seen.append(moment) if seen is not None else None,
    )


def test_a_model_is_fetched_and_opens_as_the_folder_does(hub: Hub, tiny_folder: Path) -> None:
    told: list[str] = []
    seen: list[tuple[str, int, int, str]] = []
    base = opened(TINY, told, seen)
    assert base.identity == open_base(tiny_folder, torch.float32).identity
    assert base.name == f"{TINY}@{NEW}"
    assert [word in told[0] for word in (TINY, NEW, "MB", "free")] == [True] * 4
    whole = sum(len((tiny_folder / name).read_bytes()) for name in set(hub.files_asked()))
    assert (seen[-1][1:], [moment[1] for moment in seen]) == ((whole, whole, "bytes"), sorted(m[1] for m in seen))


def test_pickles_and_code_are_never_asked_for(hub: Hub) -> None:
    opened(TINY)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(hub.files_asked())
    assert not set(hub.files_asked()) & {"pytorch_model.bin", "modeling.py", "model.onnx", "README.md"}


def test_opened_again_no_file_is_asked_for(hub: Hub) -> None:
    opened(TINY)
    hub.asked.clear()
    opened(TINY)
    assert (len(hub.asked), hub.files_asked()) == (1, [])  # where main is now
    opened(f"{TINY}@{NEW}")
    assert len(hub.asked) == 1  # a commit never changes


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_opened_as_it_was(hub: Hub, revision: str) -> None:
    old, new = opened(f"{TINY}@{revision}"), opened(TINY)
    assert (old.name, new.name) == (f"{TINY}@{OLD}", f"{TINY}@{NEW}")
    assert old.identity != new.identity


def test_a_branch_that_moved_is_followed(hub: Hub) -> None:
    hub.branches["main"] = OLD
    assert opened(TINY).name == f"{TINY}@{OLD}"
    hub.branches["main"] = NEW
    assert opened(TINY).name == f"{TINY}@{NEW}"


def test_what_was_fetched_opens_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(TINY)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert opened(TINY).name == opened(f"{TINY}@{NEW}").name == f"{TINY}@{NEW}"
    assert hub.asked == []
    with pytest.raises(BaseError, match="HF_HUB_OFFLINE"):
        opened(f"{TINY}@v1")


def test_where_the_hub_is_gone_what_was_fetched_opens_and_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(TINY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told: list[str] = []
    assert opened(TINY, told).name == f"{TINY}@{NEW}"
    assert "cannot be reached" in told[0]


def test_the_command_line_shows_bytes_and_the_time_left(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafit", "doctor", TINY])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    told = capsys.readouterr()
    assert re.search(rf"downloading {TINY} \S+/0.1 MB  \S+ left", told.err)  # a pipe: the first line of it
    assert re.search(rf"downloading {TINY}: 0.1 MB in 0 s", told.out)


def test_the_tokenizer_comes_without_the_weights(hub: Hub) -> None:
    assert open_outline(TINY).tokenizer("a")["input_ids"]
    assert "model.safetensors" not in hub.files_asked()
    assert opened(TINY).name == f"{TINY}@{NEW}"  # which are fetched when they are needed


def test_what_does_not_fit_the_disk_is_not_begun(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "free_bytes", lambda folder: 1000)
    with pytest.raises(BaseError, match=r"are needed and 0\.0 MB are free.*HF_HOME"):
        opened(TINY)
    assert hub.files_asked() == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickles only"),
        ({"config.json": b"{}", "model.Q4.gguf": b"x"}, "holds GGUF files"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "an adapter, not a base"),
        ({"README.md": b""}, "no model in transformers' layout"),
    ],
)
def test_a_repository_that_is_no_base_is_refused_before_any_file_is_fetched(
    hub: Hub, files: dict[str, bytes], said: str
) -> None:
    hub.repositories["someone/other"] = {NEW: files}
    with pytest.raises(BaseError, match=said):
        opened("someone/other")
    assert hub.files_asked() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
    ],
)
def test_weights_of_a_model_that_is_refused_are_not_fetched(hub: Hub, changed: dict[str, Any], said: str) -> None:
    files = hub.repositories[TINY][NEW]
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changed}).encode()
    for _ in range(2):  # at the second try the small files are in the cache
        with pytest.raises(BaseError, match=said):
            opened(TINY)
    assert "model.safetensors" not in hub.files_asked()


def test_a_file_that_says_a_model_is_quantised_is_fetched_before_the_weights(hub: Hub) -> None:
    hub.repositories[TINY][NEW]["hf_quant_config.json"] = b'{"quantization": {"quant_algo": "NVFP4"}}'
    with pytest.raises(BaseError, match=r"quantised to NVFP4 \(quantization in hf_quant_config\.json\)"):
        opened(TINY)
    assert "model.safetensors" not in hub.files_asked()


def test_what_the_hub_refuses_is_told_with_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in {
        "someone/unknown": "no such path, and the hub .* knows no such model: check the spelling",
        f"{TINY}@v9": "no branch, tag or commit 'v9'",
    }.items():
        with pytest.raises(BaseError, match=said):
            opened(name)
    hub.gated.add(TINY)
    with pytest.raises(BaseError, match=r"is gated: accept its terms at http.*HF_TOKEN"):
        opened(TINY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BaseError, match=r"no such path, and the hub .* cannot be reached .* HF_ENDPOINT"):
        opened(TINY)


def test_a_download_that_broke_off_is_not_taken_for_whole_and_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between its attempts
    hub.breaks_off_after = 9_000
    with pytest.raises(BaseError, match=r"^someone/tiny: the hub .* try again; what was fetched is kept"):
        opened(TINY)
    assert not list((tmp_path / "hub").glob("*/refs/main"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (TINY, f"{TINY}@{NEW}"):
        with pytest.raises(BaseError, match="does not hold it whole"):
            opened(name)
    assert not [one for one in doctor.bases_at_hand() if one.kind == "hub"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.breaks_off_after = None
    assert opened(TINY).name == f"{TINY}@{NEW}"


def test_a_local_folder_comes_before_the_hub(
    hub: Hub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / TINY).symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    assert (opened(TINY).name, hub.asked) == (TINY, [])


def test_an_adapter_names_the_commit_and_opens_it_again(hub: Hub, tmp_path: Path) -> None:
    base = opened(f"{TINY}@v1")
    adapter = fresh(base, uniform(base.sites[:2], 2, 4), seed=0)
    peft.write(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (TINY, OLD)
    hub.branches["v1"] = NEW
    name = peft.read(tmp_path / "adapter").base_name
    assert name is not None
    assert opened(name).identity == base.identity
    (tmp_path / "adapter" / peft.OURS).unlink()
    assert peft.read(tmp_path / "adapter").base_name == f"{TINY}@{OLD}"  # as PEFT itself would read it


def test_what_is_at_hand_is_listed_and_shown_without_a_download(hub: Hub) -> None:
    with pytest.raises(ValueError, match="there is no such path"):
        shown(Path(TINY))
    opened(f"{TINY}@v1")
    listed = [one for one in doctor.bases_at_hand() if one.kind == "hub"]
    assert [one.name for one in listed] == [f"{TINY}@{OLD}"]
    assert listed[0].bytes is not None and listed[0].bytes > 50_000
    assert shown(Path(listed[0].name))["kind"] == "base"


def test_the_variables_every_user_of_the_hub_knows_are_heeded(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, as they are read when the hub's client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    code = f"from lorafit.bases.base import open_outline; open_outline('{TINY}')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home" / "hub").glob("models--*/snapshots/*/config.json"))
