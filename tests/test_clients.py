"""The server and the programs that people ask it with: curl, OpenAI's client, schemathesis, vLLM's benchmark client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from test_server import Running, adapter_of, base_of, served

from lorafit.adapters.formats import peft
from lorafit.bases.base import Base, open_outline
from lorafit.server import keys

pytestmark = pytest.mark.usefixtures("one_thread")

HELLO: Any = [{"role": "user", "content": "Hello?"}]
BENCH = Path(__file__).parents[1] / "build" / "bench-vllm" / "bin" / "python"


class Keyed:
    """A server that wants a key, its keys, and the statuses that OpenAI's client was answered."""

    def __init__(self, running: Running, file: Path):
        self.running, self.url, self.log, self.file = running, running.url, running.log, file
        self.secret = keys.create(file, "everything", ["infer", "admin"])
        self.statuses: list[int] = []
        self.opened = ExitStack()

    def key(self, name: str, *scopes: str, **quota: int) -> str:
        """A new key, once the server has read it."""
        secret = keys.create(self.file, name, scopes or ("infer",), **quota)
        self.running.service._keys.look()
        return secret

    def client(self, secret: str | None = None, **more: Any) -> openai.OpenAI:
        hooks = {"response": [lambda answer: self.statuses.append(answer.status_code)]}
        web = self.opened.enter_context(openai.DefaultHttpxClient(event_hooks=hooks))
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret or self.secret, http_client=web, **more)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder, base = tmp_path_factory.mktemp("clients"), base_of()
    for seed, name in enumerate(("returns", "it-support")):
        peft.write(adapter_of(base, seed + 1), folder / "adapters" / name)
    keys.create(folder / "keys.json", "first", ["infer"])
    with served(folder / "adapters", folder / "keys.json", room=64) as running:
        made = Keyed(running, folder / "keys.json")
        running.service._keys.look()
        assert running.service.phase == "ready", running.service.failed
        with made.opened:
            yield made


# curl


@pytest.fixture
def curl(server: Keyed) -> Callable[..., str]:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("needs curl: install it")

    def asked(path: str, *flags: str, key: str | None = server.secret, **body: Any) -> str:
        words = [program, "-sS", "--max-time", "60", server.url + path, *flags]
        words += ["-H", f"authorization: Bearer {key}"] if key else []
        words += ["-H", "content-type: application/json", "-d", json.dumps(body)] if body else []
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    return asked


def test_curl_is_answered_whole_and_as_a_stream(server: Keyed, curl: Callable[..., str]) -> None:
    body = {"model": "returns", "messages": HELLO, "max_tokens": 8}
    whole = json.loads(curl("/v1/chat/completions", **body))["choices"][0]
    *parts, last = curl("/v1/chat/completions", "-N", **body, stream=True).rstrip("\n").split("\n\n")
    choices = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
    assert "".join(one["delta"].get("content", "") for one in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] and last == "data: [DONE]"
    listed = json.loads(curl("/v1/models"))["data"]
    assert {"tiny", "returns", "returns@1", "it-support"} <= {card["id"] for card in listed}
    assert json.loads(curl("/v1/models/returns"))["parent"] == "tiny"


def test_curl_reads_errors(server: Keyed, curl: Callable[..., str]) -> None:
    told = ("-w", "\n%{http_code} %{content_type}")
    for key, more, status, words in (
        (None, {}, 401, "Authorization: Bearer"),
        (server.secret, {"model": "nobody"}, 404, "no model has this name"),
        (server.secret, {"max_tokens": "8"}, 400, "max_tokens: Input should be a valid integer"),
    ):
        body, _, kind = curl(
            "/v1/chat/completions", *told, key=key, **{"model": "tiny", "messages": HELLO, **more}
        ).rpartition("\n")
        error = json.loads(body)["error"]
        assert kind == f"{status} application/json" and error["code"] == status and words in error["message"]
    assert curl("/v1/chat/completions", "-o", os.devnull, "-w", "%{http_code}", "-X", "GET") == "405"


# OpenAI's client


class Place(BaseModel):
    city: Literal["Paris", "Rome"]
    far: bool


def test_openais_client_reads_answers_in_every_form_it_has(server: Keyed) -> None:
    client = server.client(max_retries=0)
    raw = client.chat.completions.with_raw_response.create(model="returns", messages=HELLO, max_tokens=8)
    assert raw.headers["x-lorafit-adapter"] == "returns@1" and raw.parse().model == "returns@1"
    said = raw.parse().choices[0].message.content
    parts = list(client.chat.completions.create(model="returns", messages=HELLO, max_tokens=8, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said
    made = client.chat.completions.parse(model="returns", messages=HELLO, response_format=Place)
    assert isinstance(made.choices[0].message.parsed, Place)
    with client.chat.completions.stream(model="returns", messages=HELLO, response_format=Place) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == made.choices[0].message.parsed
    anything = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=8,
        top_p=0.5,
        seed=3,
        temperature=1.0,
        stop=["\n"],
        presence_penalty=0,
        extra_body={"ignore_eos": True},
    )
    assert anything.choices[0].finish_reason in {"stop", "length"} and anything._request_id
    whole = client.completions.create(
        model="it-support", prompt="Hello", max_tokens=8, logprobs=2, extra_body={"ignore_eos": True}
    )
    texts = list(
        client.completions.create(
            model="it-support",
            prompt="Hello",
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert "".join(part.choices[0].text for part in texts if part.choices) == whole.choices[0].text
    assert texts[-1].usage is not None and texts[-1].usage.completion_tokens == 8
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.tokens or ()) == 8
    ids = client.completions.create(model="tiny", prompt=[72, 101, 108], max_tokens=2)
    assert ids.usage is not None and ids.usage.prompt_tokens == 3


async def _answers_at_once(client: openai.AsyncOpenAI) -> list[str | None]:
    import asyncio

    async def one(model: str) -> str | None:
        parts = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, stream=True)
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    said = await asyncio.gather(*(one(model) for model in ("tiny", "returns", "it-support") * 4))
    await client.close()
    return list(said)


def test_openais_client_asks_many_at_once(server: Keyed) -> None:
    import asyncio

    said = asyncio.run(_answers_at_once(openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.secret)))
    assert said[:3] * 4 == said and len(set(said)) == 3


def test_openais_client_asks_again_when_it_is_told_to_come_back(server: Keyed) -> None:
    def ask(client: openai.OpenAI, n: int = 1) -> None:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, n=n)

    client = server.client(max_retries=3)
    service = server.running.service
    service.phase = "loading"
    back = threading.Timer(0.3, lambda: setattr(service, "phase", "ready"))
    back.start()
    began = time.monotonic()
    server.statuses.clear()
    ask(client)
    assert server.statuses == [503, 200]
    assert time.monotonic() - began >= 1, "it waits as long as retry-after says"
    back.join()
    few = server.client(server.key("few", requests=60), max_retries=3)
    for n in (16, 16, 16, 12):
        ask(few, n)
    server.statuses.clear()
    ask(few)
    assert server.statuses == [429, 200]
    with pytest.raises(openai.RateLimitError, match="quota of the key 'few'"):
        ask(few.with_options(max_retries=0), 2)


def test_openais_client_asks_only_once_what_will_not_change(server: Keyed) -> None:
    client = server.client()
    assert client.max_retries > 0
    long: Any = [{"role": "user", "content": "a" * (5 << 20)}]
    other = server.client("lf-none"), server.client(server.key("operator", "admin"))
    cases: list[tuple[openai.OpenAI, dict[str, Any], type[openai.APIStatusError], int]] = [
        (client, {"model": "nobody"}, openai.NotFoundError, 404),
        (client, {"temperature": 99}, openai.BadRequestError, 400),
        (client, {"messages": []}, openai.BadRequestError, 400),
        (client, {"messages": long}, openai.APIStatusError, 413),
        (other[0], {}, openai.AuthenticationError, 401),
        (other[1], {}, openai.PermissionDeniedError, 403),
    ]
    for one, wrong, kind, status in cases:
        server.statuses.clear()
        with pytest.raises(kind) as refused:
            one.chat.completions.create(**{"model": "tiny", "messages": HELLO, **wrong})
        assert server.statuses == [status], wrong
        assert isinstance(refused.value.body, dict) and refused.value.body["message"]


def test_a_base_that_writes_says_that_it_gives_no_embeddings(server: Keyed) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="'tiny' writes text and gives no embeddings"):
        client.embeddings.create(model="tiny", input="Hello")
    with pytest.raises(openai.NotFoundError, match="POST /v1/moderations: there is no such path"):
        client.moderations.create(input="Hello")


# schemathesis


def informed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what this server knows and no document can say: the names it serves, for drawn ones would all
    be 404, and what an operator may ask now."""
    schemas = document["components"]["schemas"]
    models = {"enum": ["tiny", "returns", "returns@1", "it-support"]}
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"] = models
        bias = schemas[name]["properties"]["logit_bias"]["anyOf"][0]
        (known,) = bias["patternProperties"].values()
        bias["patternProperties"] = {"^([0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-5][0-9]|260)$": known}
    # Without a system prompt there may be no message of the role system, which a schema cannot say.
    schemas["ChatRequest"]["properties"]["no_system"] = {"enum": [False, None]}
    schemas["TokenizeRequest"]["properties"]["no_system"] = {"enum": [False, None]}
    turn, nothing = schemas["Turn"]["properties"], {"type": "null"}  # an answer of a tool must have its call
    turn["role"]["enum"] = ["system", "developer", "user", "assistant"]
    turn["tool_calls"] = turn["function_call"] = nothing
    for name in ("ChatRequest", "TokenizeRequest"):  # tools take more room than the tiny base has
        schemas[name]["properties"] |= {"tools": nothing, "tool_choice": {"enum": ["none", "auto", None]}}
    for name in ("TokenizeRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"anyOf": [models, {"type": "null"}]}
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]["maximum"] = 260
    for verb, body in (
        ("load", {"lora_name": "coming", "lora_path": "returns"}),
        ("unload", {"lora_name": "moving@1"}),
        ("rollback", {"lora_name": "moving"}),
    ):
        taken = document["paths"][f"/v1/{verb}_lora_adapter"]["post"]["requestBody"]["content"]["application/json"]
        taken["examples"] = {"one": {"value": body}}
    document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = models
    return document


@pytest.mark.parametrize("examples", [pytest.param(10), pytest.param(400, marks=pytest.mark.slow)])
def test_no_answer_is_other_than_the_document_says(server: Keyed, examples: int, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="needs schemathesis: pip install -e '.[dev]'")
    allowed = {"authorization": f"Bearer {server.secret}"}
    document = httpx.get(f"{server.url}/openapi.json", headers=allowed).json()
    moving = {"lora_name": "moving", "lora_path": "returns", "load_inplace": True}
    for _ in range(3):
        httpx.post(f"{server.url}/v1/load_lora_adapter", json=moving, headers=allowed)
    (tmp_path / "openapi.json").write_text(json.dumps(informed(document)))
    words = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", "openapi.json"]
    words += ["--url", server.url, "--header", f"Authorization: Bearer {server.secret}", "--seed", "1"]
    words += ["--max-examples", str(examples), "--continue-on-failure", "--no-color", "--generation-database", "none"]
    # What is well formed may still be refused, by what no schema says: a conversation of a system message alone, a
    # prompt that leaves no room, a schema that no answer can keep to, a name that is taken.
    words += ["--exclude-checks", "positive_data_acceptance"]
    before = len(server.log)
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    answered = Counter((told["path"], told["status"]) for told in server.log[before:])
    assert not [told for told in answered if told[1] >= 500]
    for path, operations in document["paths"].items():
        if path not in {"/health", "/v1/models/{name}"}:
            assert answered[path, 200] > 0, f"{[*operations]} {path} was never asked well"
    assert answered["/v1/chat/completions", 200] > examples / 2


# vLLM's benchmark client


@pytest.fixture(scope="module")
def real(real_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`lorafit serve` with the built-in base and two adapters: its address."""
    if not BENCH.exists():
        pytest.skip("needs vLLM's benchmark client: make bench-serve makes its environment")
    folder = tmp_path_factory.mktemp("real")
    for seed, name in enumerate(("returns", "it-support")):
        peft.write(adapter_of(real_base, seed), folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "lorafit",
        "serve",
        "smollm2-135m",
        "returns=returns",
        "it-support=it-support",
        "--port",
        str(port),
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise AssertionError((folder / "log").read_text())
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["chat", "completions", "adapters"])
def test_vllms_benchmark_client_completes_and_measures(real: str, style: str, tmp_path: Path) -> None:
    # Its command line asks for the package "vllm", which the build for the CPU is not called.
    run = "from vllm.benchmarks.serve import add_cli_args, main\nfrom vllm.utils.argparse_utils import "
    run += "FlexibleArgumentParser\nasked = FlexibleArgumentParser()\nadd_cli_args(asked)\nmain(asked.parse_args())"
    how = {
        "chat": ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"],
        "completions": ["--backend", "openai", "--endpoint", "/v1/completions"],
    }
    how["adapters"] = [*how["chat"], "--lora-modules", "returns", "it-support"]
    words = [str(BENCH), "-c", run, "--base-url", real, *how[style], "--model", "smollm2-135m"]
    words += ["--tokenizer", str(open_outline("smollm2-135m").folder), "--dataset-name", "random", "--ignore-eos"]
    words += ["--random-input-len", "32", "--random-output-len", "12", "--num-prompts", "20", "--request-rate", "4"]
    words += ["--save-result", "--save-detailed", "--result-filename", "result.json", "--disable-tqdm"]
    ran = subprocess.run(
        words,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "unavailable" not in ran.stdout, "/tokenize answers it"
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (20, 0, 20 * 12), found["errors"]
    assert all(0 < first < whole for first, whole in zip(found["ttfts"], found["latencies"], strict=True))
    assert all(between and max(between) > 0 for between in found["itls"])
    assert found["mean_itl_ms"] > 0 and found["mean_tpot_ms"] > 0
    if style == "adapters":
        counts = httpx.get(f"{real}/metrics").text
        assert all(f'lorafit:requests_total{{adapter="{name}"' in counts for name in ("returns", "it-support"))
