"""The processes that serve in `bench/serve.py`: which there are, their environments, how they are spoken to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_work import BASE, BUILD, Workload

HERE = Path(__file__).parent
ARMS = {
    "lorafit": "lorafit",
    "lorafit-1000": "lorafit, 1,000 more registered",
    "lorafit-8bit": "lorafit, 8-bit weights",
    "vllm": "vLLM",
    "vllm-base": "vLLM without LoRA",
    "peft": "PEFT, adapter_names",
    "transformers": "transformers, bare",
    "llamacpp": "llama.cpp",
    "llamacpp-q8": "llama.cpp, Q8_0",
}
BARE = ("vllm-base", "transformers", "llamacpp", "llamacpp-q8")
PEERS = {
    "vllm": "requirements-serve-vllm.txt",
    "peft": "requirements-train.txt",
    "llamacpp": "requirements-serve-llamacpp.txt",
    "sklearn": "requirements-routing.txt",
}
# Come with vLLM, are not needed to serve text, and fail to load beside torch for the CPU: they want CUDA's libraries.
WITHOUT = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


def serves(arm: str, work: Workload) -> bool:
    """Whether an arm takes part: for what it is there."""
    if arm in BARE and work.adapters:
        return False
    if arm.startswith("llamacpp"):
        return work.requests == 1
    if arm == "lorafit-1000":
        return work == replace(work, requests=16, adapters=8, kind="r8", long=False)
    return arm != "lorafit-8bit" or (not work.long and work.kind == "r8")


@dataclass(eq=False)
class Arm:
    """A process that serves, and what it has said."""

    name: str
    process: subprocess.Popen[str]
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def hear(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.failed = f"ended with status {self.process.wait()}"
            return None
        told: dict[str, Any] = json.loads(line)
        return told

    def serve(self, workload: Workload, asked: list[dict[str, Any]]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        if (told := self.hear()) is not None:
            self.found.setdefault(workload.name, []).append(told)


def environment(peer: str, flags: Sequence[str]) -> str:
    """The interpreter a peer runs in, in an environment of its own, made once for each list of pins."""
    wanted = (HERE / PEERS[peer]).read_text(encoding="utf-8")
    folder = HERE.parent / "build" / f"bench-{peer}"
    python, mark = folder / ("Scripts" if os.name == "nt" else "bin") / "python", folder / "ready"
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        print(f"setting up {folder.relative_to(HERE.parent)}, once", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags]
        subprocess.run([*pip, "-r", str(HERE / PEERS[peer])], check=True)
        if without := WITHOUT.get(peer):
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return str(python)


def gguf_of(dtype: str) -> Path:
    """The base in llama.cpp's format, its weights the same numbers in another dtype; made once."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

    from lorafit.bases.builtin import file_of

    kind = {"fp32": GGMLQuantizationType.F32, "bf16": GGMLQuantizationType.BF16, "q8": GGMLQuantizationType.Q8_0}[dtype]
    target = BUILD / f"{BASE}-{dtype}.gguf"
    if not target.exists():
        source = GGUFReader(file_of(BASE))
        part = target.with_suffix(".part")
        writer = GGUFWriter(part, source.fields["general.architecture"].contents())
        for name, field_ in source.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field_.contents(), field_.types[0], field_.types[-1])
        for tensor in source.tensors:
            values, flat = dequantize(tensor.data, tensor.tensor_type), len(tensor.shape) < 2
            own = GGMLQuantizationType.F32 if flat else kind
            writer.add_tensor(tensor.name, quantize(values, own), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(target)
    return target


def started(name: str, job: Mapping[str, Any], flags: Sequence[str]) -> Arm:
    """The process of an arm, ready or failed. job: see serve_child. flags: of pip."""
    family = {"vllm-base": "vllm", "transformers": "peft"}.get(name, name.partition("-")[0])
    given = dict(job)
    if family == "llamacpp":
        given["gguf"] = str(gguf_of("q8" if name == "llamacpp-q8" else job["dtype"]))
    path = BUILD / f"{name}.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    python = sys.executable if family == "lorafit" else environment(family, flags)
    log = (BUILD / f"{name}.log").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [python, str(HERE / f"serve_{family}.py"), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    arm = Arm(name, process)
    arm.about = arm.hear() or {}
    print(f"{ARMS[name]}: {arm.failed or 'ready'}" + (f", see {log.name}" if arm.failed else ""), file=sys.stderr)
    return arm
