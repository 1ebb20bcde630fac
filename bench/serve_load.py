"""The clients of `bench/serve.py --http`: one process that asks a server and notes when what comes.

It computes on the cores of the server: so it is the standard library alone, and looks into what came when all is over.

One line of JSON on stdin is one load, answered by one line on stdout. Each request has a moment `at`, in seconds from
the start, at which it is asked whatever became of those before (open loop); or there are so many `clients`, each of
which asks the next when its answer has ended (closed loop).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

HOST = "127.0.0.1"
Came = list[tuple[float, bytes]]  # when, in seconds from the start, and what


async def parts(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def exchange(port: int, body: bytes, began: float, came: Came) -> str | None:
    """Ask, and note what comes. What went wrong, if anything."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}:{port}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = (await reader.readline()).split()[1:2]
        while (await reader.readline()).strip():
            pass
        if status != [b"200"]:
            return f"status {status} {(await reader.read(500))!r}"
        async for part in parts(reader):
            came.append((time.perf_counter() - began, part))
        return None
    finally:
        writer.close()


async def load(port: int, asked: list[dict[str, Any]], clients: int | None, patience: float) -> dict[str, Any]:
    bodies = [
        json.dumps(
            {
                "model": one["model"],
                "prompt": one["prompt"],
                "max_tokens": one["tokens"],
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for one in asked
    ]
    at: list[float] = [one.get("at", 0.0) for one in asked]
    came: list[Came] = [[] for _ in asked]
    failed: list[str | None] = [None] * len(asked)
    late = 0.0
    began, cpu = time.perf_counter(), time.process_time()

    async def ask(number: int) -> None:
        try:
            failed[number] = await asyncio.wait_for(exchange(port, bodies[number], began, came[number]), patience)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            failed[number] = repr(error)

    async def ask_at(number: int) -> None:
        nonlocal late
        await asyncio.sleep(at[number] - (time.perf_counter() - began))
        late = max(late, time.perf_counter() - began - at[number])
        await ask(number)

    async def ask_on(numbers: Iterator[int]) -> None:
        for number in numbers:
            at[number] = time.perf_counter() - began
            await ask(number)

    numbers = iter(range(len(asked)))
    tasks = map(ask_at, numbers) if clients is None else (ask_on(numbers) for _ in range(clients))
    await asyncio.gather(*tasks)
    told = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "late": late}
    return {**told, "served": [looked_into(*one) for one in zip(at, came, failed, strict=True)]}


def looked_into(at: float, came: Came, failed: str | None) -> dict[str, Any]:
    """One answer: when it was asked, when each part with text came (the first even without), what it says and used."""
    times: list[float] = []
    text, rest, done = "", b"", False
    usage: dict[str, int] = {}
    for when, part in came:
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            _, _, data = event.partition(b"data: ")
            if data.strip() == b"[DONE]":
                done = True
                continue
            told = json.loads(data)
            failed = failed or (f"{told['error']}" if "error" in told else None)
            usage = told.get("usage") or usage
            new = "".join(choice.get("text") or "" for choice in told.get("choices", ()))
            if told.get("choices") and (new or not times):
                times.append(when)
                text += new
    if not (failed or (done and times and usage)):
        failed = "the answer is not whole"
    return {
        "at": at,
        "times": times,
        "end": came[-1][0] if came else at,
        "text": text,
        "failed": failed,
        "tokens": usage.get("completion_tokens", 0),
    }


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
