"""The lorafit arm of `bench/serve.py`: the engine as a library."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from serve_child import Asked, Served, read_job, take_turns  # isort: skip

import torch
from serve_inside import nll_change, profile, registered, stall_ms, switch_ms

from lorafit.bases.base import open_base
from lorafit.serving import Engine, Request

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    job = read_job()
    base = open_base(job["model"], DTYPES[job["dtype"]])
    adapters = {name: Path(folder) for name, folder in job["adapters"].items()}
    held = sum(path.stat().st_size for folder in adapters.values() for path in folder.glob("*.safetensors"))
    about: dict[str, Any] = {}
    if job["eight_bit"]:
        about["nll"] = nll_change(base, Path(job["text"]).read_text(encoding="utf-8"))
    with Engine(
        base,
        adapters,
        slots=job["slots"],
        room=job["room"],
        eight_bit=job["eight_bit"],
        hot_bytes=2 * held + 1,
        warm_bytes=2 * held + 1,
    ) as engine:
        if job["more"]:  # registered, and never asked for
            folders = list(adapters.values())
            more = []
            for i in range(job["more"]):  # each published before the next is read: what is not in use is let go
                more.append(engine.adapters.add(f"more-{i}", folders[i % len(folders)]))
                engine.adapters.publish(more[-1])
            for version in more:
                engine.adapters.remove(version.name)
            asking = [list(adapters)[i % 8] for i in range(16)]
            about["registered"] = registered(engine, job["prompts"], asking, more)
        if engine._steps.decoder is not None:  # ms of a step in one call, and by layers, as measured when it opened
            timings = engine._steps.decoder.timings
            about["step_ms"] = {rows: [1000 * seconds for seconds in timings.at(rows)] for rows in timings.rows}
        if job["inside"]:
            names, prompts = list(adapters)[:8], job["prompts"]
            about["switch_ms"] = switch_ms(engine, prompts[0], names)
            about["load"] = stall_ms(engine, prompts[0], list(adapters.values()))
            for kind, own in (("base", [None] * 16), ("mixed", [names[i % 8] for i in range(16)])):
                about[f"profile_{kind}"] = profile(engine, prompts, own)

        def serve(asked: list[Asked]) -> list[Served]:
            began = time.perf_counter()
            served = [Served([], []) for _ in asked]

            def listen(number: int) -> None:
                for piece in answers[number]:
                    served[number].ids.extend(token.id for token in piece.tokens)
                    served[number].at.append(time.perf_counter() - began)

            answers = [
                engine.submit(Request(tuple(one.prompt), one.adapter, max_tokens=one.tokens, ignore_end=True))
                for one in asked
            ]
            listeners = [threading.Thread(target=listen, args=(i,)) for i in range(len(asked))]
            for one in listeners:
                one.start()
            for one in listeners:
                one.join()
            return served

        take_turns(serve, versions={"torch": torch.__version__}, **about)


if __name__ == "__main__":
    main()
