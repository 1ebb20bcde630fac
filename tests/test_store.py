"""The server's store, router and answers where a disk, a folder, a base or the engine fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from test_server import ASK, adapter_of, admin, base_of, routed_desks, served

from lorafit.adapters.formats import peft
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, FormatError, RequestError
from lorafit.server import keys
from lorafit.server.service import Service
from lorafit.server.store import Store
from lorafit.serving import Engine, Request

__all__ = ["routed_desks"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@contextmanager
def stored(root: Path, base: Base | None = None) -> Iterator[tuple[Store, list[str]]]:
    """A store as a server that starts has it, and what it says."""
    said: list[str] = []
    with Engine(base or base_of(), slots=1) as engine:
        store = Store(engine, root, said.append, lambda name: None)
        try:
            store.restore()
            yield store, said
        finally:
            store.close()


def live(store: Store) -> dict[str, int]:
    return {version.name: version.number for version, is_live in store.engine.adapters.listed() if is_live}


def looked(store: Store) -> Store:
    store.look()
    store.look()
    return store


@pytest.fixture
def root(routed_desks: Path, tmp_path: Path) -> Path:
    shutil.copytree(routed_desks, tmp_path / "root")
    return tmp_path / "root"


def other_base() -> Base:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.05)
    return replace(Base.of(model, "other"), tokenizer=byte_tokenizer())


def test_after_a_start_with_another_base_nothing_of_the_first_is_served_or_lost(root: Path) -> None:
    with stored(root) as (store, _):
        before = live(looked(store))
    with stored(root, other_base()) as (store, said):
        assert not live(looked(store)) and sum("belongs to base 'tiny'" in line for line in said) == len(before)
        peft.write(adapter_of(store.engine.base, 5), root / "own")
        assert live(looked(store)) == {"own": 1}
    with stored(root) as (store, _):
        assert live(store) == before


def test_a_folder_of_another_base_is_not_read_into_a_version(root: Path) -> None:
    with stored(root) as (store, _):
        looked(store)
        version = store.engine.adapters.find("returns")
        version.loaded = version.adapter = None
        store.engine.base = store.engine.adapters.base = other_base()
        with pytest.raises(AdapterError, match="belongs to base 'tiny'"):
            store.engine.adapters.heat(version)


@pytest.mark.parametrize("action", ["rollback", "unload"])
def test_what_a_full_disk_refuses_has_not_happened(root: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(root) as running:
        for _ in range(2):
            admin(running, "load", lora_name="products", lora_path="products", load_inplace=True)
        store = running.service.store
        assert store is not None and live(store)["products"] == 3
        with monkeypatch.context() as patch:
            patch.setattr("lorafit.server.store.write_json", full)
            for _ in range(2):
                refused = admin(running, action, lora_name="products")
                assert refused.status_code == 507 and "No space left" in refused.json()["error"]["message"]
                assert live(store)["products"] == 3
        assert admin(running, action, lora_name="products").status_code == 200
        assert live(store).get("products") == (2 if action == "rollback" else None)
        kept = json.loads((root / ".lorafit/registry.json").read_text())["versions"]
        assert {one["name"]: one["number"] for one in kept if one["live"]} == live(store)


def test_what_the_disk_refused_is_tried_again_and_said_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(root) as (store, said):
        with monkeypatch.context() as patch:
            patch.setattr("shutil.copyfile", full)
            for _ in range(4):
                store.look()
        assert not live(store) and len(said) == 3
        store.look()
        assert live(store) == {"returns": 1, "it-support": 1, "products": 1}


def test_a_kill_before_a_version_is_stored_loses_no_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with stored(root) as (store, _):
        looked(store)
        shutil.copytree(root / "returns", root / "fresh")
        store.look()
        with monkeypatch.context() as patch:
            patch.setattr(store, "load", killed)
            with pytest.raises(Killed):
                store.look()
        store.unload("it-support")  # writes the registry
    with stored(root) as (store, _):
        assert set(live(looked(store))) == {"returns", "products", "fresh"}


def test_where_a_live_copy_is_damaged_what_was_rolled_back_from_does_not_come_back(root: Path) -> None:
    copies = root / ".lorafit" / "versions"
    with stored(root) as (store, _):
        looked(store).load("returns", root / "products")
        store.load("returns", root / "it-support")
        store.rollback("returns")
    (copies / "returns@2" / peft.WEIGHTS).unlink()
    with stored(root) as (store, said):
        assert live(store)["returns"] == 1 and "'returns' now serves returns@1" in " ".join(said)
        store.unload("returns@3")
        assert (copies / "returns@2").is_dir(), "it may be mended"
    shutil.rmtree(copies / "returns@1")
    with stored(root) as (store, said):
        assert "returns" not in live(store)
        store.unload("products")
    with stored(root) as (store, said):
        assert not any("returns@1" in line for line in said), "what is gone is said once"


def test_a_registry_of_format_1_is_served_and_what_was_unloaded_stays_away(root: Path) -> None:
    """Adapters had other digests then."""
    registry = root / ".lorafit/registry.json"
    with stored(root) as (store, _):
        looked(store).unload("products")
        before = live(store)
    text = registry.read_text()
    for name in ("returns", "it-support", "products"):
        adapter = peft.read(root / name)
        assert adapter.digest() in text
        text = text.replace(adapter.digest(), adapter.digest_of_format_1())
    registry.write_text(text)
    with stored(root) as (store, _):
        assert live(looked(store)) == before
        assert all(store.engine.adapters.heat(version) for version, _ in store.engine.adapters.listed())


def test_a_router_that_cannot_be_kept_routes_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.server.live_router.whole_file", full)
    said: list[str] = []
    service = Service("tiny", lambda: Engine(base_of(), slots=1), root=root, say=said.append)
    service.start()
    try:
        while service.phase == "loading":
            time.sleep(0.01)
        assert service.phase == "ready" and any("cannot be written" in line for line in said)
        assert service.live_router is not None and service.live_router.router is not None
        assert service.store is not None
        service.store.unload("products")
        service.live_router.look()
        assert service.live_router.router.names == ("it-support", "returns")
    finally:
        service.close()


def test_an_end_while_adapters_are_loaded_waits_for_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        shutil.copytree(root / "returns", root / f"more-{i}")
    stage: Callable[..., Any] = Engine.stage
    begun: list[str] = []

    def slowly(engine: Engine, name: str, *more: Any) -> Any:
        begun.append(name)
        time.sleep(0.3)
        return stage(engine, name, *more)

    monkeypatch.setattr(Engine, "stage", slowly)
    service = Service("tiny", lambda: Engine(base_of(), slots=1), root=root, say=lambda text: None)
    service.start()
    while not begun:
        time.sleep(0.01)
    service.close()
    assert len(begun) <= 2 and service.failed is None


def test_a_fault_of_the_server_is_no_fault_of_the_request(root: Path) -> None:
    with served(root) as running:
        engine = running.service.engine
        version = engine.adapters.find("returns")
        version.loaded = version.adapter = None
        assert version.folder is not None
        version.folder.rename(version.folder.with_name("away"))
        answer = running.ask("returns")
        assert answer.status_code == 503 and answer.headers["retry-after"] and str(root) not in answer.text
        forward = engine._steps.forward

        def slowly(*given: Any) -> Any:
            time.sleep(0.02)
            return forward(*given)

        def broken() -> None:
            raise RuntimeError("the driver died")

        engine._steps.forward = slowly  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            long = {"max_tokens": 300, "ignore_eos": True}
            whole, stream = (
                pool.submit(running.ask, "tiny", **long),
                pool.submit(running.ask, "tiny", stream=True, **long),
            )
            time.sleep(0.3)
            engine._scheduler.drop_cancelled = broken  # type: ignore[method-assign]
            assert whole.result().status_code == 503 and "driver" not in whole.result().text
            assert "ServiceUnavailableError" in stream.result().text.strip().split("\n")[-1]


def test_what_nobody_thought_of_is_an_error_like_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("Hello?")

    with served(root) as running:
        monkeypatch.setattr(running.service, "prompt", broken)
        answer = running.ask("returns")
        assert answer.status_code == 500 and answer.json()["error"]["code"] == 500 and answer.headers["x-request-id"]
    # The line is written after the answer has gone out: the server has stopped by now.
    assert running.log[-1]["failed"].startswith("KeyError at test_store.py") and "Hello?" not in str(running.log)


def test_token_ids_for_the_router_are_those_of_the_base(root: Path) -> None:
    with served(root) as running:
        for ids in ([2**70], [2**31], [10**6], [-1]):
            body = {"model": "auto", "prompt": ids, "max_tokens": 1}
            answer = httpx.post(f"{running.url}/v1/completions", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["message"], ids
        assert httpx.post(f"{running.url}/v1/completions", json={**body, "prompt": [72, 105]}).status_code == 200


def test_a_key_whose_requests_are_used_up_has_nothing_read_by_the_router(root: Path, tmp_path: Path) -> None:
    key = keys.create(tmp_path / "keys.json", "one", ["infer"], requests=1)
    with served(root, tmp_path / "keys.json") as running:
        read: list[Any] = []
        features = running.service.engine.features
        running.service.engine.features = lambda texts: (read.append(texts), features(texts))[1]  # type: ignore
        assert [running.ask("auto", key).status_code for _ in range(3)] == [200, 429, 429] and len(read) == 1


def test_many_questions_for_the_router_keep_nobody_waiting(root: Path) -> None:
    with served(root) as running, ThreadPoolExecutor(60) as pool:
        forward = running.service.engine._steps.forward

        def slowly(*given: Any) -> Any:
            time.sleep(0.05)
            return forward(*given)

        running.service.engine._steps.forward = slowly  # type: ignore[method-assign]
        busy = [pool.submit(running.ask, "tiny", max_tokens=20, ignore_eos=True) for _ in range(4)]
        asked = [pool.submit(running.ask, "auto", max_tokens=1) for _ in range(50)]
        began = time.perf_counter()
        assert httpx.post(f"{running.url}/tokenize", json={"prompt": "Hello?"}).status_code == 200
        assert time.perf_counter() - began < 1
        assert {one.result().status_code for one in (*busy, *asked)} == {200}


def test_a_version_that_was_chosen_answers_whatever_becomes_of_its_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.create(tmp_path / "keys.json", "few", ["infer"], ["returns"])
    with served(root, tmp_path / "keys.json") as running:
        service, prompt = running.service, running.service.prompt

        def unloading(*given: Any, **named: Any) -> Any:
            assert service.store is not None
            service.store.unload("returns")
            return prompt(*given, **named)

        monkeypatch.setattr(service, "prompt", unloading)
        answer = running.ask("returns", key)
        assert answer.status_code == 200 and answer.headers["x-lorafit-adapter"] == "returns@1"
        missing = running.ask("returns", key)
        assert missing.status_code == 404 and "products" not in missing.text


def test_a_schema_that_cannot_be_kept_to_to_the_end_is_told() -> None:
    kinds = [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(300)]
    with Engine(base_of(), slots=1, room=256) as engine, pytest.raises(RequestError, match="schema"):
        engine.submit(Request((72, 101), max_tokens=40, schema={"anyOf": kinds})).result()


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys.json", "desk", ["infer"], requests=1)
    told = json.loads((tmp_path / "keys.json").read_text())
    told["keys"].append({**told["keys"][0], "requests": 5})
    (tmp_path / "keys.json").write_text(json.dumps(told))
    with pytest.raises(FormatError, match="desk: given twice"):
        keys.read(tmp_path / "keys.json")


def test_null_is_as_not_said(root: Path) -> None:
    with served(root) as running:
        nothing = dict.fromkeys(("ignore_eos", "seed", "stop", "n", "temperature", "top_p", "stream"))
        answer = httpx.post(f"{running.url}/v1/chat/completions", json={**ASK, "model": "tiny", **nothing})
        assert answer.status_code == 200, answer.text
