"""The router: a linear classifier over features of questions, with a class for what is for no adapter.

That class is taught by questions about everything else, which come with lorafit, and by those that the adapters' own
data declines. Below a threshold that is set on validation it abstains, and the bare base answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise

import torch
from torch import Tensor

from lorafit.bases.base import Base
from lorafit.errors import AdapterError, FormatError
from lorafit.routing.features import Features, depths, packed, unpacked

DECAY = 1e-6  # of the weights; chosen on validation of the built-in desks among 1e-3 to 1e-6
STEPS = 100  # of L-BFGS, at most
CALM = 10  # steps that gain a thousandth in all end it; the first ones are short
HELD = 5  # of the questions about everything else every fifth is kept for validation
FORMAT = 1


@cache
def elsewhere() -> tuple[str, ...]:
    """Questions about everything, which are for no adapter unless its own data says so."""
    return tuple(files("lorafit.routing").joinpath("elsewhere.txt").read_text("utf-8").splitlines())


@dataclass(frozen=True)
class Routed:
    """Where a question goes. adapter: None for the base. probability: of that; scores: of each adapter that may be
    used, None for what is for none of them; together 1."""

    adapter: str | None
    probability: float
    scores: Mapping[str | None, float]


@dataclass(frozen=True, eq=False)
class Router:
    """mean, scale (D,); weights (D + 1, names + 1), the last row a bias, the last column what is for no adapter.
    threshold: below which it abstains. right, kept_out: shares of validation questions that went to their adapter, and
    of those for none that went to none. key: of what it was trained on."""

    key: str
    names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weights: Tensor
    threshold: float
    right: float
    kept_out: float

    def probabilities(self, features: Tensor) -> Tensor:
        """(n, D) → (n, names + 1)."""
        return _logits(self, features).softmax(1)

    def route(self, features: Tensor, allowed: Collection[str] | None = None) -> Routed:
        """Of one question, (D,): to the adapter it is for, of all, where that is one of these names; None: any is.
        Among a few alone nearly every question of another adapter would look like one of theirs."""
        found = dict(zip(self.names, self.probabilities(features[None])[0].tolist(), strict=False))
        scores: dict[str | None, float] = {
            name: score for name, score in found.items() if allowed is None or name in allowed
        }
        nearest = max(scores.values(), default=0.0)
        scores[None] = max(0.0, 1.0 - sum(scores.values()))  # whose it is beside these is not told
        best = max(found, key=lambda name: found[name])
        if best not in scores or found[best] < self.threshold:
            return Routed(None, 1.0 - nearest, scores)
        return Routed(best, found[best], scores)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        about = {
            "format": FORMAT,
            "key": self.key,
            "names": self.names,
            "numbers": [self.threshold, self.right, self.kept_out],
        }
        return packed({"mean": self.mean, "scale": self.scale, "weights": self.weights}, about)

    @staticmethod
    def from_bytes(content: bytes, where: str) -> Router:
        """Raises FormatError."""
        try:
            tensors, about = unpacked(content)
            names = tuple(str(name) for name in about["names"])
            numbers = [float(number) for number in about["numbers"]]
            found = Router(about["key"], names, tensors["mean"], tensors["scale"], tensors["weights"], *numbers)
            if found.weights.shape != (len(found.mean) + 1, len(names) + 1) or found.scale.shape != found.mean.shape:
                raise ValueError("shapes that do not fit")
        except Exception as error:  # a damaged file may raise anything
            raise FormatError(f"{where}: no router ({error}): remove it, and it is trained again") from error
        return found


def key_of(contents: Mapping[str, bytes], base: str) -> str:
    """Of what a router is trained on: the files of features by name, the base's identity, our questions."""
    total = hashlib.sha256(repr((FORMAT, DECAY, base, elsewhere())).encode())
    for name in sorted(contents):
        total.update(f"|{name}|".encode() + hashlib.sha256(contents[name]).digest())
    return total.hexdigest()


def learnable(contents: Mapping[str, bytes], base: Base, width: int) -> tuple[dict[str, Features], dict[str, str]]:
    """What a router of this base can learn from, of files of features by name; and by name why not from the others.
    width: of the features of a question."""
    found, left_out = {}, {}
    for name, content in contents.items():
        try:
            one = Features.from_bytes(content, name)
        except FormatError as error:
            left_out[name] = str(error)
            continue
        if (one.base, one.depths) != (base.identity, depths(base)):
            left_out[name] = "its questions were read by another base: give them with lorafit route --learn"
        elif one.train.shape[1] != width:
            left_out[name] = "its file is damaged: give its questions with lorafit route --learn"
        else:
            found[name] = one
    return found, left_out


def fit(adapters: Mapping[str, Features], others: Tensor, key: str = "") -> Router:
    """A router between adapters, by the features of their questions and those of `elsewhere()`."""
    work = fitting(adapters, others, key)
    while True:
        try:
            next(work)
        except StopIteration as ended:
            router: Router = ended.value
            return router


def fitting(adapters: Mapping[str, Features], others: Tensor, key: str = "") -> Generator[None, None, Router]:
    """As fit, in pieces: for whoever has something else to do between them. Softmax regression in which every class
    weighs the same, however many questions it has, by L-BFGS. Raises AdapterError where there is nothing to learn from.
    """
    if not adapters:
        raise AdapterError("no adapter keeps questions that a router could learn from: train one, or give --learn")
    names = tuple(sorted(adapters))
    train = [(adapters[name].train, number) for number, name in enumerate(names)]
    valid = [(adapters[name].valid, number) for number, name in enumerate(names)]
    for name in names:
        train.append((adapters[name].train_declined, len(names)))
        valid.append((adapters[name].valid_declined, len(names)))
    held = torch.arange(len(others)) % HELD == 0
    x, y = _stacked([*train, (others[~held], len(names))])
    x_valid, y_valid = _stacked([*valid, (others[held], len(names))])
    mean, scale = x.mean(0), x.std(0) + 1e-3
    counts = torch.bincount(y, minlength=len(names) + 1)
    share = (1 / counts.clamp(min=1) / (counts > 0).sum())[y]  # of a question in the whole
    inputs = _inputs(x, mean, scale)
    targets = torch.nn.functional.one_hot(y, len(names) + 1).float()
    weights = torch.zeros(inputs.shape[1], len(names) + 1)
    # One step at a time; max_eval would be 1 by itself, and a line search that is broken off there goes nowhere.
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1, max_eval=25, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    decay = torch.full((inputs.shape[1], 1), DECAY)
    decay[-1] = 0.0  # not of the bias

    def loss() -> Tensor:
        logits = inputs @ weights
        weights.grad = inputs.T @ ((logits.softmax(1) - targets) * share[:, None]) + 2 * decay * weights
        told: Tensor = -(logits.log_softmax(1) * targets * share[:, None]).sum() + (decay * weights**2).sum()
        return told

    told: list[float] = []
    for _ in range(STEPS):
        told.append(float(optimizer.step(loss)))
        if len(told) > CALM and told[-CALM] - told[-1] < 1e-3 * told[-1]:
            break
        yield
    made = Router(key, names, mean, scale, weights, 0.5, 0.0, 0.0)
    threshold, right, kept_out = _threshold(made.probabilities(x_valid), y_valid)
    return replace(made, threshold=threshold, right=right, kept_out=kept_out)


def _stacked(parts: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    parts = [(rows, number) for rows, number in parts if len(rows)]
    labels = [torch.full((len(rows),), number) for rows, number in parts]
    return torch.cat([rows.float() for rows, _ in parts]), torch.cat(labels)


def _inputs(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardised, of about unit length, and a one for the bias."""
    x = (features.float() - mean) / scale / len(mean) ** 0.5
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def _logits(router: Router, features: Tensor) -> Tensor:
    return _inputs(features, router.mean, router.scale) @ router.weights


def _threshold(found: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Where the mean of both shares is highest on validation, in the middle of where it is, of 0.3 to 0.95; and the
    shares there."""
    none = found.shape[1] - 1
    score, best = found[:, :none].max(1)
    own, right = labels < none, best == labels

    def shares(threshold: float) -> tuple[float, float]:
        sent = (right & (score >= threshold))[own].float().mean() if own.any() else torch.tensor(1.0)
        return float(sent), float((score < threshold)[~own].float().mean())

    tried = [0.3 + 0.65 * i / 130 for i in range(131)]
    told = [sum(shares(threshold)) for threshold in tried]
    places = [i for i, value in enumerate(told) if value >= max(told) - 1e-6]
    runs = [[places[0]]]
    for before, place in pairwise(places):
        runs[-1].append(place) if place == before + 1 else runs.append([place])
    widest = max(runs, key=len)
    threshold = tried[widest[len(widest) // 2]]
    return (threshold, *shares(threshold))
