"""The kernels compiled for other processors than this one, against torch in double."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from torch import Tensor

from lorafit.adapters.plan import uniform
from lorafit.bases.base import Base
from lorafit.layers.site import select
from lorafit.serving import Engine, Request
from lorafit.serving import native as made
from lorafit.serving.native import Kernels, Parts, kernels
from lorafit.serving.timing import FIRST
from lorafit.testing import random_adapter

CPU = torch.device("cpu")
BUILT = made._library.__wrapped__  # as it is without what it remembers
NEEDS = {  # what of a processor's flags code for each level of x86-64 uses
    "native": set[str](),
    "x86-64-v2": {"ssse3", "sse4_1", "sse4_2"},
    "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
WIDTHS = ((1, 1), (3, 50), (37, 5), (131, 149), (263, 97))  # d_in, d_out
ROWS = (1, 2, 3, 4, 5, 7, 31, 32, 33, 70)
RANKS = (1, 3, 12, 13, 29)


@pytest.fixture(scope="module", params=sorted(NEEDS))
def level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Has `kernels` be those compiled for this level while the tests of it run."""
    name = str(request.param)
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip(f"levels of x86-64 on a machine of {platform.machine()}: nothing to compile")
    if missing := NEEDS[name] - {*made._processor().replace("'", " ").split()}:
        pytest.skip(f"this processor runs no code for {name}: it lacks {', '.join(sorted(missing))}")
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    if name != "native":  # -O2: the same loops, in 2 s of compiling instead of 10
        patch.setenv("LORAFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        own = {"-march=native": f"-march={name}", "-O3": "-O2"}
        patch.setattr(made, "COMPILE", tuple(own.get(word, word) for word in made.COMPILE))
    library = BUILT()
    if library is None:
        pytest.skip("needs a C++ compiler: install g++ or clang")
    patch.setattr(made, "_library", lambda: library)
    return name


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype, CPU)
    assert found is not None
    return found


class Mixed:
    """Adapters of a few rows each, between rows of none: what the kernels are told of them, and what they add."""

    def __init__(self, rows: int, d_in: int, d_out: int, dtype: torch.dtype, gap: int):
        """gap: rows of none before the first; what another step left behind is not to be read there."""
        self.factors: list[tuple[int, int, Tensor, Tensor]] = []
        start, table = 0, []
        for number, rank in enumerate((*RANKS, 0)):
            start += (number + gap) % 3
            end = min(rows, start + 1 + 5 * (number % 2))
            if start >= end:
                break
            a, b = torch.randn(rank, d_in).to(dtype), torch.randn(rank, d_out).to(dtype)
            self.factors.append((start, end, a, b))
            table.append((a.data_ptr(), b.data_ptr(), rank))
            start = end
        self.scale = torch.linspace(-1.0, 2.0, rows)
        self._edges = np.array([part[:2] for part in self.factors], dtype=np.int64)
        self._table = np.array(table, dtype=np.int64)
        self.parts = Parts(len(table), self._edges.ctypes.data, self._table.ctypes.data, self.scale.data_ptr())

    def added(self, x: Tensor, d_out: int, sizes: bool = False) -> Tensor:
        """In double. sizes: with all numbers positive, by which rounding is measured."""
        of = torch.Tensor.abs if sizes else torch.Tensor.clone
        y = torch.zeros(len(x), d_out, dtype=torch.float64)
        for start, end, a, b in self.factors:
            inner = of(x[start:end].double()) @ of(a.double()).T
            y[start:end] += of(self.scale[start:end, None].double()) * inner @ of(b.double())
        return y


def require_near(found: Tensor, wanted: Tensor, sizes: Tensor) -> None:
    """Sums in fp32 err by a little of what is summed, and what is stored in bf16 by half of its last bit."""
    last = 2.0**-9 if found.dtype == torch.bfloat16 else 0.0
    error = (found.double() - wanted).abs()
    bound = 1e-6 * sizes + 1.01 * last * torch.exp2(torch.frexp(wanted).exponent.double())
    assert torch.isfinite(found).all()
    assert (error <= bound).all(), f"{float((error / bound).max()):.3g} times what rounding explains"


def given(rows: int, d_in: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1000 * rows + d_in)).to(dtype)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp32 by int8", "bf16 by int8"])
def test_products_are_those_of_torch_in_double(level: str, kind: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if kind.startswith("fp32") else torch.bfloat16
    own = kernels_of(dtype)
    for d_in, d_out in WIDTHS:
        weight, scale = torch.randn(d_out, d_in).to(dtype), None
        if kind.endswith("int8"):
            weight, scale = torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8), torch.rand(d_out) / 64
        bias = torch.randn(d_out).to(dtype)
        wide = weight.double() * (1.0 if scale is None else scale.double()[:, None])
        for rows, gap in product(ROWS, (0, 2)):
            x, mixed = given(rows, d_in, dtype), Mixed(rows, d_in, d_out, dtype, gap)
            plain, size = x.double() @ wide.T, x.double().abs() @ wide.abs().T
            require_near(own.linear(x, weight, scale, None), plain, size)
            require_near(
                own.linear(x, weight, scale, bias, mixed.parts),
                plain + bias.double() + mixed.added(x, d_out),
                size + bias.double().abs() + mixed.added(x, d_out, True),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adapters_add_is_that_of_torch_in_double_and_no_other_number_changes(
    level: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    own = kernels_of(dtype)
    for d_in, d_out in WIDTHS:
        for rows, gap in product(ROWS, (0, 2)):
            x, mixed = given(rows, d_in, dtype), Mixed(rows, d_in, d_out, dtype, gap)
            around = torch.randn(rows * d_out + 64).to(dtype)
            before, y = around.clone(), around[32:-32].view(rows, d_out)
            wanted = y.double() + mixed.added(x, d_out)
            size = y.double().abs() + mixed.added(x, d_out, True)
            own.add(y, x, mixed.parts)
            require_near(y, wanted, size)
            owned = torch.zeros(rows, dtype=torch.bool)
            for start, end, a, _ in mixed.factors:
                owned[start:end] = len(a) > 0
            assert torch.equal(y[~owned], before[32:-32].view(rows, d_out)[~owned]), "rows of the bare base"
            assert torch.equal(around[:32], before[:32]) and torch.equal(around[-32:], before[-32:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_left_the_numbers_tells_so_and_leaves_the_others_alone(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own, weight = kernels_of(dtype), torch.randn(50, 131).to(dtype)
    for rows in (1, 6, 33):
        for value in (torch.nan, torch.inf):
            x = given(rows, 131, dtype)
            sound = own.linear(x, weight, None, None)
            x[rows // 2, 130] = value
            found = own.linear(x, weight, None, None)
            assert not torch.isfinite(found[rows // 2]).any()
            others = [row for row in range(rows) if row != rows // 2]
            assert torch.equal(found[others], sound[others])


def answers(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities of all answers, asked so that prompts are read beside answers; and what each step read."""
    read: list[list[int]] = []
    real = engine._steps.mixer.begin

    def begin(owners: Sequence[object], scales: Sequence[float], lengths: Sequence[int], kept: object) -> None:
        read.append(list(lengths))
        real(owners, scales, lengths, kept)  # type: ignore[arg-type]

    engine._steps.mixer.begin = begin  # type: ignore[method-assign]
    first = engine.submit(Request(prompts[0], "small", max_tokens=60, logprobs=5, ignore_end=True))
    next(iter(first))
    rest = [
        engine.submit(Request(prompt, name, max_tokens=8, logprobs=5, ignore_end=True))
        for prompt in prompts[1:]
        for name in ("small", None, "large")
    ]
    told = [[value for token in one.result().tokens for _, value in token.top] for one in (first, *rest)]
    return told, read


def test_an_engine_on_them_answers_as_one_without(level: str) -> None:
    prompts = [tuple(range(97, 97 + n)) for n in (5, 1, 9, 40)]
    found = []
    for native in (True, False):
        base = Base.of(tiny_llama(), "tiny")
        small, large = (
            uniform(select(base.sites, which), rank, 16.0)
            for which, rank in ((["*_proj"], 3), (["mlp.*", "lm_head"], 13))
        )
        own = {"small": random_adapter(base, small, 1, size=0.15), "large": random_adapter(base, large, 2, size=0.15)}
        with Engine(base, own, native=native) as engine:
            if engine._steps.decoder is not None:
                engine._steps.decoder.timings = FIRST
            told, read = answers(engine, prompts)
            found.append(told)
            assert any(1 in step and max(step) > 1 for step in read), "no step had both a prompt and an answer"
            assert not native or (engine._steps.decoder is not None and (engine._steps.decoder.spent > 0).all())
    for here, there in zip(*found, strict=True):
        assert here == pytest.approx(there, abs=1e-4)


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was compiled yet, with no compiler but what is put into this folder."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(made, "_library", cache(BUILT))
    return tmp_path


def compiler(folder: Path, script: str) -> None:
    (folder / "c++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "c++").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo 'k.cpp:9: fatal error: no vector here' >&2; echo 'compilation terminated.' >&2; exit 1",
            "no vector here",
        ),
        ("echo 'clang: unsupported option -fopenmp' >&2; exit 1", "unsupported option -fopenmp"),
        ("exit 3", "exit status 3"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "too short|invalid ELF|not a mach-o|slice"),
    ],
)
def test_a_compiler_that_fails_is_told_of_once(anew: Path, script: str, words: str) -> None:
    compiler(anew, script)
    with pytest.warns(UserWarning, match=f"(?s){words}.*several times slower.*install a g\\+\\+") as told:
        assert kernels(torch.float32, CPU) is None
    assert len(told) == 1 and str(anew / "c++") in str(told[0].message)
    assert kernels(torch.bfloat16, CPU) is None, "and not again: a warning is an error here"


def test_without_a_compiler_nothing_is_said(anew: Path) -> None:
    assert kernels(torch.float32, CPU) is None
