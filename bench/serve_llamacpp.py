"""The llama.cpp arm of `bench/serve.py`: one stream of the bare base. Imports nothing of lorafit."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

from serve_child import Asked, Served, read_job, take_turns  # isort: skip

import xllamacpp


def main() -> None:
    job = read_job()
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel = job["gguf"], job["room"], 1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(given)

    def serve(asked: list[Asked]) -> list[Served]:
        began, made = time.perf_counter(), []
        for one in asked:
            at: list[float] = []

            def came(chunk: dict[str, Any], at: list[float] = at) -> None:
                at.append(time.perf_counter() - began)

            server.handle_completions(
                {
                    "prompt": list(one.prompt),
                    "n_predict": one.tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "cache_prompt": True,
                    "stream": True,
                },
                came,
            )
            made.append(Served([-1] * one.tokens, at[: one.tokens]))  # it tells texts, not ids
        return made

    take_turns(serve, versions={"xllamacpp": version("xllamacpp"), "system": xllamacpp.get_system_info()})


if __name__ == "__main__":
    main()
