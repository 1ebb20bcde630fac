"""The arms of `bench/serve.py` by transformers' generate: PEFT with `adapter_names`, or nothing but the bare base.
Imports nothing of lorafit."""

from __future__ import annotations

import time
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from serve_child import Asked, Served, read_job, take_turns
from transformers import AutoModelForCausalLM, StoppingCriteria

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock(StoppingCriteria):
    """Notes when each step has come; stops nothing."""

    def __init__(self) -> None:
        self.began, self.at = time.perf_counter(), list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.at.append(time.perf_counter() - self.began)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    job = read_job()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]]).eval()
    for name, folder in job["adapters"].items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)

    @torch.inference_mode()
    def serve(asked: list[Asked]) -> list[Served]:
        width = max(len(one.prompt) for one in asked)
        ids = torch.tensor([[0] * (width - len(one.prompt)) + list(one.prompt) for one in asked])
        seen = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in asked])
        clock, own = Clock(), {}
        if any(one.adapter for one in asked):
            own["adapter_names"] = [one.adapter or "__base__" for one in asked]
        out = model.generate(
            input_ids=ids,
            attention_mask=seen,
            do_sample=False,
            min_new_tokens=asked[0].tokens,
            max_new_tokens=asked[0].tokens,
            pad_token_id=0,
            stopping_criteria=[clock],
            **own,
        )
        return [Served(row[width:].tolist(), clock.at) for row in out]

    take_turns(
        serve, versions={"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    )


if __name__ == "__main__":
    main()
