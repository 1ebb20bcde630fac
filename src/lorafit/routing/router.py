"""The router: a linear classifier over features of questions, with a class for questions that belong to no adapter.

That class is trained with general questions, which come with lorafit, and with those that the adapters' data declines.
Where the best probability is below a threshold, which is set on validation, the bare base answers.
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
PATIENCE = 10  # training ends after this many steps that together reduce the loss by less than a thousandth
HELD = 5  # every fifth general question is kept for validation
FORMAT = 1


@cache
def elsewhere() -> tuple[str, ...]:
    """General questions, which belong to no adapter."""
    return tuple(files("lorafit.routing").joinpath("elsewhere.txt").read_text("utf-8").splitlines())


@dataclass(frozen=True)
class Routed:
    """The router's choice. adapter: None for the base. probability: of this choice. scores: the probability of each
    adapter that may be used, and under None of none of them; together 1."""

    adapter: str | None
    probability: float
    scores: Mapping[str | None, float]


@dataclass(frozen=True, eq=False)
class Router:
    """A trained router.

    Args:
        key: of what it was trained on, from `key_of`.
        names: of the adapters.
        mean, scale: that standardise features, (D,).
        weights: (D + 1, names + 1); the last row is a bias, and the last column the class of no adapter.
        threshold: of the probability below which no adapter is chosen.
        right: share of the adapters' validation questions that were sent to their adapter.
        kept_out: share of the other validation questions that were sent to the base.
    """

    key: str
    names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weights: Tensor
    threshold: float
    right: float
    kept_out: float

    def probabilities(self, features: Tensor) -> Tensor:
        """Features (n, D) → probabilities (n, names + 1)."""
        return (_inputs(features, self.mean, self.scale) @ self.weights).softmax(1)

    def route(self, features: Tensor, allowed: Collection[str] | None = None) -> Routed:
        """Choose the adapter of one question, (D,). It is chosen among all adapters, and used only if it is allowed:
        among a few, nearly every question of another adapter would look like one of theirs. allowed: None: all."""
        all_scores = dict(zip(self.names, self.probabilities(features[None])[0].tolist(), strict=False))
        scores: dict[str | None, float] = {
            name: score for name, score in all_scores.items() if allowed is None or name in allowed
        }
        nearest = max(scores.values(), default=0.0)
        scores[None] = max(0.0, 1.0 - sum(scores.values()))  # names that are not allowed are not revealed
        best = max(all_scores, key=lambda name: all_scores[name])
        if best not in scores or all_scores[best] < self.threshold:
            return Routed(None, 1.0 - nearest, scores)
        return Routed(best, all_scores[best], scores)

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        about = {
            "format": FORMAT,
            "key": self.key,
            "names": self.names,
            "numbers": [self.threshold, self.right, self.kept_out],
        }
        return packed({"mean": self.mean, "scale": self.scale, "weights": self.weights}, about)

    @staticmethod
    def from_bytes(content: bytes, where: str) -> Router:
        """Read a file that `to_bytes` has made. Raises FormatError, which names the file by `where`."""
        try:
            tensors, about = unpacked(content)
            names = tuple(str(name) for name in about["names"])
            numbers = [float(number) for number in about["numbers"]]
            mean, scale, weights = (tensors[name] for name in ("mean", "scale", "weights"))
            if weights.shape != (len(mean) + 1, len(names) + 1) or scale.shape != mean.shape:
                raise ValueError("shapes that do not fit")
            return Router(about["key"], names, mean, scale, weights, *numbers)
        except Exception as error:  # a damaged file may raise anything
            raise FormatError(f"{where}: not a router ({error}): remove it, and it is trained again") from error


def key_of(contents: Mapping[str, bytes], base: str) -> str:
    """A digest of what a router is trained on: files of features, by name, the identity of the base, and the general
    questions."""
    digest = hashlib.sha256(repr((FORMAT, DECAY, base, elsewhere())).encode())
    for name in sorted(contents):
        digest.update(f"|{name}|".encode() + hashlib.sha256(contents[name]).digest())
    return digest.hexdigest()


def learnable(contents: Mapping[str, bytes], base: Base, width: int) -> tuple[dict[str, Features], dict[str, str]]:
    """Read files of features, given by adapter name.

    Args:
        contents: of the files.
        base: that the router is for.
        width: of the features of a question.

    Returns:
        The features that a router of this base can be trained with, and by name the reasons why others are left out.
    """
    usable, left_out = {}, {}
    for name, content in contents.items():
        try:
            features = Features.from_bytes(content, name)
        except FormatError as error:
            left_out[name] = str(error)
            continue
        if (features.base, features.depths) != (base.identity, depths(base)):
            left_out[name] = "its questions were read by another base: give them with lorafit route --learn"
        elif features.train.shape[1] != width:
            left_out[name] = "its file is damaged: give its questions with lorafit route --learn"
        else:
            usable[name] = features
    return usable, left_out


def fit(adapters: Mapping[str, Features], others: Tensor, key: str = "") -> Router:
    """Train a router. adapters: the features of their questions; others: features of the questions of `elsewhere()`,
    (n, D); key: of what it is trained on. Raises AdapterError where there is nothing to learn from."""
    work = fitting(adapters, others, key)
    while True:
        try:
            next(work)
        except StopIteration as ended:
            router: Router = ended.value
            return router


def fitting(adapters: Mapping[str, Features], others: Tensor, key: str = "") -> Generator[None, None, Router]:
    """Train a router as `fit` does, in pieces, so that a caller can do something else between them.

    It is a softmax regression, trained with L-BFGS, in which all classes have the same weight, however many questions
    they have.
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
    share = (1 / counts.clamp(min=1) / (counts > 0).sum())[y]  # the weight of each question in the loss
    inputs = _inputs(x, mean, scale)
    targets = torch.nn.functional.one_hot(y, len(names) + 1).float()
    weights = torch.zeros(inputs.shape[1], len(names) + 1)
    # One step at a time. max_eval would default to 1, and a line search that stops after one evaluation gets nowhere.
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1, max_eval=25, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    decay = torch.full((inputs.shape[1], 1), DECAY)
    decay[-1] = 0.0  # none for the bias

    def loss() -> Tensor:
        logits = inputs @ weights
        weights.grad = inputs.T @ ((logits.softmax(1) - targets) * share[:, None]) + 2 * decay * weights
        value: Tensor = -(logits.log_softmax(1) * targets * share[:, None]).sum() + (decay * weights**2).sum()
        return value

    losses: list[float] = []
    for _ in range(STEPS):
        losses.append(float(optimizer.step(loss)))
        if len(losses) > PATIENCE and losses[-PATIENCE] - losses[-1] < 1e-3 * losses[-1]:
            break
        yield
    router = Router(key, names, mean, scale, weights, 0.5, 0.0, 0.0)
    threshold, right, kept_out = _threshold(router.probabilities(x_valid), y_valid)
    return replace(router, threshold=threshold, right=right, kept_out=kept_out)


def _stacked(parts: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    parts = [(rows, number) for rows, number in parts if len(rows)]
    labels = [torch.full((len(rows),), number) for rows, number in parts]
    return torch.cat([rows.float() for rows, _ in parts]), torch.cat(labels)


def _inputs(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardised features of about unit length, with a one for the bias: (n, D) → (n, D + 1)."""
    x = (features.float() - mean) / scale / len(mean) ** 0.5
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def _threshold(probabilities: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The threshold from 0.3 to 0.95 with the highest mean of `right` and `kept_out` on validation, and these two. Of
    several it is the middle of the longest run. probabilities: (n, names + 1); labels: (n,)."""
    none = probabilities.shape[1] - 1
    score, best = probabilities[:, :none].max(1)
    has_adapter, is_right = labels < none, best == labels

    def shares(threshold: float) -> tuple[float, float]:
        sent = (is_right & (score >= threshold))[has_adapter].float().mean() if has_adapter.any() else torch.tensor(1.0)
        return float(sent), float((score < threshold)[~has_adapter].float().mean())

    thresholds = [0.3 + 0.65 * i / 130 for i in range(131)]
    sums = [sum(shares(threshold)) for threshold in thresholds]
    places = [i for i, value in enumerate(sums) if value >= max(sums) - 1e-6]
    runs = [[places[0]]]
    for before, place in pairwise(places):
        runs[-1].append(place) if place == before + 1 else runs.append([place])
    longest = max(runs, key=len)
    threshold = thresholds[longest[len(longest) // 2]]
    return (threshold, *shares(threshold))
