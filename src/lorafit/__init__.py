"""lorafit fits low-rank adapters to your task, proves that they help, and leaves the base untouched."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorafit.version import __version__ as __version__

# Public names and where they live. They are imported at first use, so that `lorafit --help` answers at once.
_PUBLIC = {
    "Adapter": "lorafit.adapters.adapter",
    "Base": "lorafit.bases.base",
    "Engine": "lorafit.serving.engine",
    "LowRank": "lorafit.adapters.plan",
    "Message": "lorafit.data.examples",
    "Plan": "lorafit.adapters.plan",
    "Recipe": "lorafit.training.recipe",
    "Renderer": "lorafit.data.render",
    "Request": "lorafit.serving.request",
    "Site": "lorafit.layers.site",
    "Terminal": "lorafit.cli.console",
    "TrainSettings": "lorafit.settings",
    "TrainState": "lorafit.adapters.state",
    "attach": "lorafit.attachment.adapters",
    "compare": "lorafit.evaluation.compare",
    "decide": "lorafit.planning",
    "fired": "lorafit.attachment.watching",
    "fresh": "lorafit.attachment.pure",
    "generate": "lorafit.generation.greedy",
    "merged": "lorafit.attachment.pure",
    "open_base": "lorafit.bases.base",
    "read_adapter": "lorafit.adapters.formats.peft:read",
    "read_examples": "lorafit.data.reading",
    "render": "lorafit.data.render",
    "renderer_for": "lorafit.data.render",
    "run_evaluation": "lorafit.jobs.evaluate",
    "run_training": "lorafit.jobs.train",
    "save_adapter": "lorafit.adapters.formats.peft:write",
    "select": "lorafit.layers.site",
    "train": "lorafit.training.loop",
    "train_steps": "lorafit.training.loop",
    "uniform": "lorafit.adapters.plan",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 (all of them strings)

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter as Adapter
    from lorafit.adapters.formats import peft as _peft
    from lorafit.adapters.plan import LowRank as LowRank
    from lorafit.adapters.plan import Plan as Plan
    from lorafit.adapters.plan import uniform as uniform
    from lorafit.adapters.state import TrainState as TrainState
    from lorafit.attachment.adapters import attach as attach
    from lorafit.attachment.pure import fresh as fresh
    from lorafit.attachment.pure import merged as merged
    from lorafit.attachment.watching import fired as fired
    from lorafit.bases.base import Base as Base
    from lorafit.bases.base import open_base as open_base
    from lorafit.cli.console import Terminal as Terminal
    from lorafit.data.examples import Message as Message
    from lorafit.data.reading import read_examples as read_examples
    from lorafit.data.render import Renderer as Renderer
    from lorafit.data.render import render as render
    from lorafit.data.render import renderer_for as renderer_for
    from lorafit.evaluation.compare import compare as compare
    from lorafit.generation.greedy import generate as generate
    from lorafit.jobs.evaluate import run_evaluation as run_evaluation
    from lorafit.jobs.train import run_training as run_training
    from lorafit.layers.site import Site as Site
    from lorafit.layers.site import select as select
    from lorafit.planning import decide as decide
    from lorafit.serving.engine import Engine as Engine
    from lorafit.serving.request import Request as Request
    from lorafit.settings import TrainSettings as TrainSettings
    from lorafit.training.loop import train as train
    from lorafit.training.loop import train_steps as train_steps
    from lorafit.training.recipe import Recipe as Recipe

    read_adapter, save_adapter = _peft.read, _peft.write


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lorafit' has no attribute '{name}'")
    module, _, other = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), other or name)
