"""Every error can be raised by a mistake, names its place and a next step, and is in docs/errors.md as it is printed.

The mistakes stand in docs/errors.md: files (`$ cat`), commands (`$ lorafit`), lines of Python (`>>>`), each followed by
what it prints. They are run here, in a folder with a tiny base and a few files. To print them anew after a message has
changed: python tests/test_errors.py
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import json
import os
import pickle
import pkgutil
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, capitals, tiny_llama, write_rows
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

import lorafit
from lorafit import errors
from lorafit.adapters.formats import peft
from lorafit.bases.base import Base, open_base
from lorafit.cli import main
from lorafit.cli.console import Terminal
from lorafit.errors import InputError, Interrupted, LorafitError
from lorafit.training.loop import Moment

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
STEPS = {
    "accept",
    "add",
    "ask",
    "begin",
    "check",
    "choose",
    "copy",
    "correct",
    "end",
    "evaluate",
    "fill",
    "give",
    "go",
    "join",
    "keep",
    "leave",
    "lower",
    "make",
    "merge",
    "move",
    "name",
    "open",
    "put",
    "raise",
    "remove",
    "rename",
    "repeat",
    "restore",
    "save",
    "say",
    "see",
    "shorten",
    "start",
    "train",
    "try",
    "type",
    "unpack",
    "use",
    "write",
    "convert",
    "change",
    "do",
    "load",
    "roll",
    "set",
    "stop",
    "take",
    "unload",
}
# Where no path or flag that was typed is at fault:
PLACE = r"\bstep \d|\bthe base in memory|\.[a-z]_proj\b|^prompt: |^'desk'|requests are waiting|the engine"
COMPUTED = {  # the next step is written elsewhere: by advice.py and _uneven, the error passed on, what the hub says
    "…: not a known form (fields: …): …",
    "…: … cells under … columns…: …",
    "…: …",
    "…: … tokens, the limit is …: …",
    "'…': there is no such path, and …: …",
    "…: …: …",
    "--template …: holds the control token …: …",
    "…: holds the control token … in a message: …",
    "…: no run: …",
    "….…: …",
    "……: …",
    "………: …",
    "……: …: …",
}
AS_GOOD = ("did you mean ", "pip install ", "lorafit ", "if you know ")


def proposes(message: str) -> bool:
    """The form of every message, `place: what: next step`: after a colon, a semicolon or a line break stands an
    imperative, or what may be typed as it is."""
    parts = re.split(r": |; |\n\s*", message)[1:]
    return any(re.split(r"[\s,]", part.lower())[0] in STEPS or part.startswith(AS_GOOD) for part in parts)


# What the sources say


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((ROOT / "src").rglob("*.py")):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def literal(node: ast.expr, names: dict[str, str]) -> str:
    """The text of a message as far as it stands in the source; `…` for what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return literal(node.value, names)
    if isinstance(node, ast.BinOp):
        return literal(node.left, names) + literal(node.right, names)
    if isinstance(node, ast.IfExp):
        return literal(node.body, names)
    if isinstance(node, ast.Name):
        return names.get(node.id, "…")
    asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "did_you_mean"
    return "did you mean …" if asks else "…"


def messages() -> Iterator[tuple[str, str]]:
    """Every message of an error of ours, and every problem, that stands in the source at least in part."""
    ours = {kind.__name__ for kind in tree()}
    for file, module in parsed():
        names: dict[str, str] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = literal(node.value, names)
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            said = ""
            if name in ours and node.args:
                said = literal(node.args[0], names)
            elif name == "Problem" and len(node.args) == 3:
                said = ": ".join(literal(part, names) for part in node.args)
            elif name == "wrong":
                said = "…: " + ": ".join(literal(part, names) for part in node.args[:2])
            if said.strip("… "):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", said


def test_every_message_in_the_source_proposes_a_next_step() -> None:
    silent = [f"{where}: {said!r}" for where, said in messages() if not proposes(said) and said not in COMPUTED]
    assert silent == []
    assert len(list(messages())) > 100


# What the page says


@dataclass(frozen=True)
class Mistake:
    """A block of the page: the lines that are typed, what is said to be printed, the class it stands under."""

    kind: str
    block: str

    @property
    def steps(self) -> list[tuple[str, str]]:
        """Each typed line with what follows it."""
        parts = re.split(r"^((?:\$|>>>) .*)\n", self.block, flags=re.MULTILINE)
        return list(zip(parts[1::2], parts[2::2], strict=True))


def mistakes() -> list[Mistake]:
    sections = re.split(r"^#{2,} (\w+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [
        Mistake(kind, block)
        for kind, text in zip(sections[1::2], sections[2::2], strict=True)
        for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


@dataclass
class Shell:
    """Does what a block types, in the folder it is in."""

    names: dict[str, Any]

    def run(self, line: str, after: str) -> tuple[str, BaseException | None, int]:
        """What is printed, the error behind it, the exit status."""
        sign, _, typed = line.partition(" ")
        if sign == ">>>":
            try:
                exec(typed, self.names)
            except LorafitError as error:
                return f"lorafit.errors.{type(error).__name__}: {error}\n", error, error.status
            return "", None, 0
        words = shlex.split(typed)
        if words[0] == "cat":
            Path(words[1]).parent.mkdir(exist_ok=True)
            Path(words[1]).write_text(after, encoding="utf-8")
            return after, None, 0
        return self.lorafit(words[1:])

    def lorafit(self, words: list[str]) -> tuple[str, BaseException | None, int]:
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["lorafit", *words]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            said = err.getvalue()
            return said[max(0, said.find("lorafit: ")) :], end.__context__, int(end.code or 0)  # without progress
        finally:
            sys.argv = before
        return "", None, 0


def furnish(folder: Path) -> Shell:
    """A folder such as a user has: a base, examples, an adapter of another hand; and names for lines of Python."""
    tiny_llama().save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    write_rows(folder / "my.jsonl", capitals())
    base = open_base(folder / "tiny", torch.float32)
    plan = lorafit.uniform(lorafit.select(base.sites, ["q_proj"]), 2, 4.0)
    adapter = lorafit.fresh(base, plan, 0)
    peft.write(adapter, folder / "downloaded")
    (folder / "downloaded" / "lorafit.json").unlink()
    edited = json.dumps(plan.to_json()).replace('"rank": 2', '"rank": 0', 1)
    (folder / "edited.json").write_text(edited, encoding="utf-8")
    (folder / "excel.csv").write_bytes("prompt;completion\nWo?;Im Caf\u00e9.\n".encode("cp1252"))
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text("{}", encoding="utf-8")
    both_ways = BertConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    BertLMHeadModel(both_ways).save_pretrained(folder / "fills-gaps")
    byte_tokenizer().save_pretrained(folder / "fills-gaps")
    (folder / "translator").mkdir()
    (folder / "translator" / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', encoding="utf-8"
    )
    copytree(folder / "tiny", folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "small" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {name: getattr(lorafit, name) for name in ("Engine", "Request", "attach")}
    return Shell({**names, "base": base, "adapter": adapter})


@contextlib.contextmanager
def circumstance(kind: str) -> Iterator[None]:
    """What a command alone cannot show: Ctrl-C after the first step; other code in the process, writing to the base."""
    models: list[LlamaForCausalLM] = []

    def remembering(*given: Any) -> Base:
        base = open_base(*given)
        assert isinstance(base.model, LlamaForCausalLM)
        models.append(base.model)
        return base

    def stop(terminal: Terminal, moment: Moment) -> None:
        if moment.step == 1 and moment.train_nll is not None:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        if kind == "Interrupted":
            patch.setattr(Terminal, "moment", stop)
        if kind == "BaseChangedError":
            patch.setattr("lorafit.jobs.prepare.open_base", remembering)
            patch.setattr(Terminal, "watch", lambda *_: models[0].model.norm.weight.data.mul_(1.01))
        yield


def played(mistake: Mistake, shell: Shell) -> tuple[str, BaseException | None, int]:
    """The block as it comes out when it is typed again, with the error and the status of its last line."""
    text, error, status = "", None, 0
    with circumstance(mistake.kind):
        for line, after in mistake.steps:
            said, error, status = shell.run(line, after)
            text += f"{line}\n{said}"
    return text, error, status


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("errors")
    os.chdir(folder)  # restored below: blocks name files as a user does
    return furnish(folder)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    before = Path.cwd()
    yield
    os.chdir(before)


def tree() -> list[type[LorafitError]]:
    """LorafitError and all below it, every module of the package imported."""
    programs = {"lorafit.__main__", "lorafit.jobs.with_peft"}  # importing them runs them, or asks for PEFT
    for module in pkgutil.walk_packages(lorafit.__path__, "lorafit."):
        if module.name not in programs:
            importlib.import_module(module.name)
    found, left = [], [LorafitError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return found


def test_all_errors_live_in_one_tree() -> None:
    assert {kind.__module__ for kind in tree()} == {errors.__name__}


def test_every_error_comes_whole_from_another_process() -> None:
    problems = [
        errors.Problem("a.jsonl:3", "nothing to learn in it", "fill in the answer"),
        errors.Problem("b.csv", "no table", "save it again", whole=True),
    ]
    for kind in tree():
        error = kind(problems) if kind is errors.DataError else kind("a place: what is wrong: correct it")  # type: ignore[arg-type]
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (kind, str(error), vars(error))
        assert copy.copy(error).args == error.args


def test_every_error_has_its_section() -> None:
    sections = re.findall(r"^#{2,} (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(kind.__name__ for kind in tree()) == sorted(sections)


def test_every_error_that_is_raised_has_a_mistake_that_raises_it() -> None:
    inner = {kind.__name__ for kind in tree() if kind.__subclasses__()}
    raised = {
        node.func.id
        for _, module in parsed()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    wanted = {kind.__name__ for kind in tree()} - (inner - raised)
    assert wanted == {mistake.kind for mistake in mistakes()}


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda m: f"{m.kind}: {m.steps[-1][0]}")
def test_a_mistake_is_answered_as_the_page_says(mistake: Mistake, shell: Shell) -> None:
    text, error, status = played(mistake, shell)
    assert text == mistake.block, "run python tests/test_errors.py to print the page anew"
    assert type(error).__name__ == mistake.kind
    assert status == (2 if isinstance(error, InputError) else 130 if isinstance(error, Interrupted) else 1)
    said = str(error)
    assert proposes(said), said
    assert "Traceback" not in text
    typed = [word for line, _ in mistake.steps for word in shlex.split(line)[2:]]
    assert any(word in said for word in typed) or re.search(PLACE, said), said
    assert all(proposes(str(problem)) for problem in getattr(error, "problems", ()))


def test_a_script_sees_an_error_on_stderr_alone(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        _, _, status = Shell({}).lorafit(["data", "nowhere.jsonl", "--json"])
    assert (out.getvalue(), status) == ("", 2)


@pytest.mark.parametrize("message", ["x: cannot be", "it failed", "a.jsonl:3: prompt: empty", "no: such: luck"])
def test_the_criterion_knows_a_message_that_proposes_nothing(message: str) -> None:
    assert not proposes(message)


def rewrite() -> None:
    """Print every block of the page anew."""
    page = PAGE.read_text(encoding="utf-8")
    for mistake in mistakes():
        text, error, _ = played(mistake, STAGE)
        assert type(error).__name__ == mistake.kind, f"{mistake.block} raises {error!r}"
        page = page.replace(mistake.block, text)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        STAGE = furnish(Path(name))
        rewrite()
