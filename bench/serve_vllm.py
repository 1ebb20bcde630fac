"""The vLLM arm of `bench/serve.py`: its engine in this process, step by step. Imports nothing of lorafit."""

from __future__ import annotations

import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from serve_child import Asked, Served, read_job, take_turns  # isort: skip

import torch
import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    job = read_job()
    most = max(1, len(job["adapters"]))
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=job["model"],
            dtype=DTYPES[job["dtype"]],
            enforce_eager=True,
            max_model_len=job["room"],
            max_num_seqs=job["slots"],
            enable_lora=bool(job["adapters"]),
            max_loras=most,
            max_lora_rank=job["most_rank"],
            max_cpu_loras=most,
            enable_prefix_caching=True,
        )
    )
    numbers = {name: i + 1 for i, name in enumerate(job["adapters"])}
    count = 0

    def serve(asked: list[Asked]) -> list[Served]:
        nonlocal count
        began = time.perf_counter()
        served = {}
        for one in asked:
            count += 1
            served[str(count)] = Served([], [])
            chosen = (
                LoRARequest(one.adapter, numbers[one.adapter], job["adapters"][one.adapter]) if one.adapter else None
            )
            wanted = SamplingParams(temperature=0, max_tokens=one.tokens, ignore_eos=True, detokenize=False)
            engine.add_request(str(count), {"prompt_token_ids": list(one.prompt)}, wanted, lora_request=chosen)
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids = list(output.outputs[0].token_ids)
                entry = served[output.request_id]
                entry.at.extend([time.perf_counter() - began] * (len(ids) - len(entry.ids)))
                entry.ids[:] = ids
        return list(served.values())

    take_turns(serve, versions={"torch": torch.__version__, "vllm": vllm.__version__})


if __name__ == "__main__":
    main()
