"""Does the router send questions where they belong? Beside a plain linear classifier on the same features, and TF-IDF.

    LORAFIT_DATA=... python bench/routing.py [--record]

(a) The three desks of the built-in data as three adapters, each with the questions of its desk; with the questions
that the data declines among each desk's own, and without. Asked: the held-out wordings; questions of the desks that
name no product, written for this benchmark (routing_unnamed.jsonl); questions for none: those held out of the built-in
data, and from domains that nothing here was trained on, CLINC150's out-of-scope questions and those of its domains.
(b) CLINC150's ten domains as ten adapters (Larson et al. 2019), with 512 questions each as an adapter keeps them, and
its test set; with no out-of-scope question to learn from but those that come with lorafit, and with CLINC150's hundred.

The peers get the same questions. The plain classifier is the same regression on the same features without a class for
what is for none; TF-IDF is asked with and without that class. All abstain below a threshold at which as many validation
questions of the adapters pass as with the router. Twenty-five out-of-scope questions of CLINC150 were looked at while
the questions about everything else were written, to see of which kind they lacked; none was taken over.

scikit-learn is installed into an environment of its own. Prints tables and, last, one line of JSON; --record appends
the tables to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from results import circumstances, markdown, record
from serve_arms import environment
from torch import Tensor

from lorafit import open_base, read_examples
from lorafit.bases.base import Base
from lorafit.data.examples import Example
from lorafit.routing import Features, Router, depths, elsewhere, features_of, fit, question_of

HERE = Path(__file__).parent
DESKS = ("advice", "it", "returns")


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often a question for an adapter has a higher score than one for none."""
    return float((inside[:, None] > outside[None]).float().mean())


class Reader:
    """Features of texts, each text read once."""

    def __init__(self, base: Base):
        self.base, self._known = base, dict[str, Tensor]()
        self.seconds = 0.0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        began = time.monotonic()
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        self._known |= dict(zip(new, features_of(self.base, new), strict=True))
        self.seconds += time.monotonic() - began
        return torch.stack([self._known[text] for text in texts]) if texts else torch.empty(0, 0)


def spread(texts: Sequence[str], most: int) -> list[str]:
    return list(texts[:: -(-len(texts) // most) or 1])


def builtin_desks(declined: bool) -> dict[str, dict[str, list[str]]]:
    """Questions by desk and part."""
    examples = read_examples("builtin")
    found: dict[str, dict[str, list[str]]] = {}

    def desk_of(example: Example) -> str:
        return (example.group or "none").partition(".")[0]

    for desk in DESKS:
        found[desk] = {}
        for part, split in (("train", examples.train), ("valid", examples.valid)):
            found[desk][part] = [question_of(e.messages) for e in split if desk_of(e) == desk]
            off = [question_of(e.messages) for e in split if desk_of(e) == "none"]
            found[desk][f"{part}_declined"] = off if declined else []
    return found


def clinc(folder: Path) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Texts with their domains by split; "" for none."""
    rows = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    of = {intent: domain for domain, intents in domains.items() for intent in intents}
    return {split: [(text, of.get(intent, "")) for text, intent in found] for split, found in rows.items()}, sorted(
        domains
    )


def router_of(read: Reader, asked: Mapping[str, Mapping[str, list[str]]]) -> tuple[Router, float]:
    """A router between adapters with these questions by part, and the seconds its training took."""
    base = read.base
    parts = ("train", "valid", "train_declined", "valid_declined")
    kept = {
        name: Features(base.identity, depths(base), *(read(given[part]).half() for part in parts))
        for name, given in asked.items()
    }
    others, began = read(elsewhere()), time.monotonic()
    return fit(kept, others), time.monotonic() - began


def plain(read: Reader, asked: Mapping[str, Mapping[str, list[str]]], router: Router) -> Any:
    """The same regression without a class for what is for none: (n, names)."""
    names, texts, labels = list(router.names), [], []
    for number, name in enumerate(names):
        texts += asked[name]["train"]
        labels += [number] * len(asked[name]["train"])
    x = (read(texts) - router.mean) / router.scale / len(router.mean) ** 0.5
    weights = torch.zeros(x.shape[1], len(names), requires_grad=True)
    bias = torch.zeros(len(names), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")
    wanted = torch.tensor(labels)

    def loss() -> Tensor:
        optimizer.zero_grad()
        told = torch.nn.functional.cross_entropy(x @ weights + bias, wanted) + 1e-6 * (weights**2).sum()
        told.backward()
        return told

    optimizer.step(loss)
    w, b = weights.detach(), bias.detach()
    return lambda given: ((read(given) - router.mean) / router.scale / len(router.mean) ** 0.5 @ w + b).softmax(1)


def tfidf(asked: Mapping[str, Mapping[str, list[str]]], sets: Mapping[str, list[str]], none: bool, python: str) -> Any:
    """scikit-learn's probabilities of each set; with `none`, of a last class too."""
    names = sorted(asked)

    def labelled(part: str) -> tuple[list[str], list[int]]:
        pairs = [(text, number) for number, name in enumerate(names) for text in asked[name][part]]
        if none:
            others = elsewhere() if part == "train" else ()
            declined = {text for name in names for text in asked[name][f"{part}_declined"]}
            pairs += [(text, len(names)) for text in (*others, *sorted(declined))]
        return [text for text, _ in pairs], [label for _, label in pairs]

    job = {"train": labelled("train"), "valid": labelled("valid"), "ask": sets}
    done = subprocess.run(
        [python, str(HERE / "routing_tfidf.py")], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def measured(
    scores: Mapping[str, Tensor], threshold: float, right: Mapping[str, Tensor], inside: str
) -> dict[str, float]:
    """Of each set, whose questions have an adapter, the share that went there; of the others the share that did not go
    to any. scores: (n, names). right: their adapters' numbers."""
    found = {}
    for name, given in scores.items():
        score, best = given.max(1)
        if name in right:
            found[f"{name}, sent anyhow"] = float((best == right[name]).float().mean())
            found[name] = float(((best == right[name]) & (score >= threshold)).float().mean())
        else:
            found[name] = float((score < threshold).float().mean())
            found[f"{name}, AUROC"] = auroc(scores[inside].max(1).values, score)
    return found


def compared(
    read: Reader,
    asked: Mapping[str, Mapping[str, list[str]]],
    sets: Mapping[str, list[str]],
    right: Mapping[str, Tensor],
    inside: str,
    python: str,
) -> dict[str, Any]:
    """Each method's shares."""
    router, seconds = router_of(read, asked)
    count = len(router.names)
    valid = [text for name in router.names for text in asked[name]["valid"]]
    ours = {name: router.probabilities(read(texts))[:, :count] for name, texts in sets.items()}
    passing = float((router.probabilities(read(valid))[:, :count].max(1).values >= router.threshold).float().mean())
    methods = {"router": measured(ours, router.threshold, right, inside)}

    def at_ours(scores: Tensor) -> float:
        """The threshold at which as many validation questions pass."""
        return float(torch.quantile(scores.max(1).values, 1 - passing))

    same = plain(read, asked, router)
    methods["plain linear, same features"] = measured(
        {name: same(texts) for name, texts in sets.items()}, at_ours(same(valid)), right, inside
    )
    for none in (False, True):
        told = tfidf(asked, {**sets, "": valid}, none, python)
        found = {name: torch.tensor(rows)[:, :count] for name, rows in told["found"].items()}
        threshold = at_ours(found.pop(""))
        label = "TF-IDF" + (", our questions for none" if none else "")
        methods[label] = measured(found, threshold, right, inside)
    return {
        "methods": methods,
        "threshold": router.threshold,
        "seconds": seconds,
        "questions": {name: len(parts["train"]) for name, parts in asked.items()},
        "scikit-learn": told["version"],
    }


def table(found: Mapping[str, Any]) -> str:
    names = list(found["methods"])
    rows = [
        [key, *(f"{100 * found['methods'][name][key]:.1f}" for name in names)] for key in found["methods"][names[0]]
    ]
    return markdown(["share, %", *names], rows)


def figures(found: Mapping[str, Any]) -> str:
    return f"threshold {found['threshold']:.2f}, trained in {found['seconds']:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append to bench/RESULTS.md")
    options = parser.parse_args()
    folder = Path(os.environ.get("LORAFIT_DATA", "../shared/data")) / "clinc150"
    if not folder.is_dir():
        raise SystemExit(f"needs CLINC150 in {folder}: name the folder of data sets in LORAFIT_DATA")
    python = environment("sklearn", os.environ.get("PIP_FLAGS", "").split())
    base = open_base("smollm2-135m")
    read = Reader(base)
    rows, domains = clinc(folder)
    out_of_scope = [text for text, _ in rows["oos_test"]]
    found: dict[str, Any] = {**circumstances(), "dtype": str(base.dtype)}
    parts = []
    examples = read_examples("builtin")
    held = [(question_of(e.messages), (e.group or "none").partition(".")[0]) for e in examples.test]
    unnamed = [json.loads(line) for line in (HERE / "routing_unnamed.jsonl").read_text(encoding="utf-8").splitlines()]
    sets = {
        "held-out wordings": [text for text, desk in held if desk != "none"],
        "without product names": [row["question"] for row in unnamed],
        "for none, held out": [text for text, desk in held if desk == "none"],
        "CLINC150 out of scope": out_of_scope,
        "CLINC150's ten domains": spread([text for text, _ in rows["test"]], 1500),
    }
    right = {
        "held-out wordings": torch.tensor([DESKS.index(desk) for _, desk in held if desk != "none"]),
        "without product names": torch.tensor([DESKS.index(row["desk"]) for row in unnamed]),
    }
    for declined in (True, False):
        name = "desks that decline" if declined else "desks alone"
        found[name] = compared(read, builtin_desks(declined), sets, right, "held-out wordings", python)
        parts.append(f"Three {name} ({figures(found[name])}):\n\n{table(found[name])}")
        print(parts[-1], flush=True)
    sets = {"test": [text for text, _ in rows["test"]], "out of scope": out_of_scope}
    right = {"test": torch.tensor([domains.index(domain) for _, domain in rows["test"]])}
    for declined in (False, True):
        asked = {}
        for domain in domains:
            mine = {
                part: [text for text, of in rows[split] if of == domain]
                for part, split in (("train", "train"), ("valid", "val"))
            }
            off = {
                part: [text for text, _ in rows[split]] if declined else []
                for part, split in (("train_declined", "oos_train"), ("valid_declined", "oos_val"))
            }
            asked[domain] = {"train": spread(mine["train"], 512), "valid": spread(mine["valid"], 128), **off}
        name = "CLINC150 with its hundred out of scope" if declined else "CLINC150"
        found[name] = compared(read, asked, sets, right, "test", python)
        parts.append(f"{name}, ten adapters ({figures(found[name])}):\n\n{table(found[name])}")
        print(parts[-1], flush=True)
    found["ms_per_question"] = 1000 * read.seconds / len(read._known)
    parts.append(
        f"{found['dtype'].removeprefix('torch.')}; {found['ms_per_question']:.0f} ms to read a question, "
        f"32 at once; scikit-learn {found['CLINC150']['scikit-learn']}."
    )
    print(parts[-1])
    if options.record:
        record("Routing", found, "\n\n".join(parts))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
