"""The lorafit arm of `bench/serve.py`: the engine as a library."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from serve_child import Asked, Served, read_job, take_turns

from lorafit.base import open_base
from lorafit.serving import Engine, Request

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    job = read_job()
    base = open_base(job["model"], DTYPES[job["dtype"]])
    adapters = {name: Path(folder) for name, folder in job["adapters"].items()}
    with Engine(base, adapters, slots=job["slots"], room=job["room"]) as engine:

        def serve(asked: list[Asked]) -> list[Served]:
            began = time.perf_counter()
            served = [Served([], []) for _ in asked]

            def listen(number: int) -> None:
                for piece in answers[number]:
                    served[number].ids.extend(token.id for token in piece.tokens)
                    served[number].at.append(time.perf_counter() - began)

            answers = [engine.submit(Request(tuple(one.prompt), one.adapter, max_tokens=one.tokens, ignore_end=True))
                       for one in asked]  # fmt: skip
            listeners = [threading.Thread(target=listen, args=(i,)) for i in range(len(asked))]
            for one in listeners:
                one.start()
            for one in listeners:
                one.join()
            return served

        take_turns(serve, versions={"torch": torch.__version__})


if __name__ == "__main__":
    main()
