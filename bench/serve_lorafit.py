"""The lorafit arm of `bench/serve.py`: the engine as a library."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from serve_child import Asked, Served, read_job, take_turns

from lorafit.base import open_base
from lorafit.serving import Engine, Request
from lorafit.serving.mixing import Mix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    job = read_job()
    base = open_base(job["model"], DTYPES[job["dtype"]])
    adapters = {name: Path(folder) for name, folder in job["adapters"].items()}
    held = sum(path.stat().st_size for folder in adapters.values() for path in folder.glob("*.safetensors"))
    with Engine(base, adapters, slots=job["slots"], room=job["room"], eight_bit=job["eight_bit"],
                hot_bytes=2 * held + 1, warm_bytes=2 * held + 1) as engine:  # fmt: skip
        for i in range(job["more"]):  # registered, and never asked for
            engine.adapters.publish(engine.adapters.add(f"more-{i}", list(adapters.values())[i % len(adapters)]))
        loaded = [version.loaded for version, _ in engine.adapters.listed() if version.loaded][:8]
        began = time.perf_counter()
        for _ in range(100):  # what a step does where its requests are not those of the step before
            Mix.of([loaded[i * len(loaded) // 16] for i in range(16)] if loaded else [None] * 16, [1.0] * 16, [1] * 16,
                   base.device, True)  # fmt: skip
        switch_ms = (time.perf_counter() - began) * 10

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

        take_turns(serve, versions={"torch": torch.__version__}, switch_ms=switch_ms)


if __name__ == "__main__":
    main()
