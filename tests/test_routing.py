"""The router: what it learns from, where it sends questions, and what it keeps."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, plain_module, tiny_llama
from torch import Tensor

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.bases.base import Base, open_base
from lorafit.cli import app
from lorafit.data.examples import Check, Example, Message
from lorafit.data.reading import read_examples
from lorafit.errors import AdapterError, BaseError, FormatError
from lorafit.layers.site import select
from lorafit.routing import Features, Router, depths, elsewhere, features_of, fit, learnable, question_of, token_ids
from lorafit.serving import Engine
from lorafit.testing import random_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


def base_of() -> Base:
    return replace(Base.of(tiny_llama(), "tiny"), tokenizer=byte_tokenizer())


def example(question: str, declines: bool = False) -> Example:
    check = Check(("no",), (), 9, declines=True) if declines else None
    return Example((Message("system", "Desk"), Message("user", question), Message("assistant", "no")), "here", check)


def cloud(center: Tensor, n: int, seed: int) -> Tensor:
    return center + 0.3 * torch.randn(n, len(center), generator=torch.Generator().manual_seed(seed))


def three() -> tuple[dict[str, Features], Tensor, Tensor]:
    """Two adapters whose questions lie apart, questions for none, and the places."""
    places = torch.eye(12)[:4] * 3
    none = torch.empty(0, 12)
    adapters = {}
    for i, (name, n) in enumerate((("it", 40), ("returns", 160))):
        adapters[name] = Features("b", (1,), cloud(places[i], n, i), cloud(places[i], 20, 9 + i), none, none)
    return adapters, cloud(places[2], 50, 5), places


def test_questions_go_to_the_adapter_they_are_like() -> None:
    adapters, others, places = three()
    router = fit(adapters, others)
    assert router.route(places[0]).adapter == "it" and router.route(places[1]).adapter == "returns"
    abstained = router.route(places[2])
    assert abstained.adapter is None and abstained.probability > 0.5
    assert sum(abstained.scores.values()) == pytest.approx(1) and set(abstained.scores) == {"it", "returns", None}
    assert (router.right, router.kept_out) == (1.0, 1.0)


def test_what_is_for_an_adapter_that_may_not_be_used_goes_to_the_base() -> None:
    adapters, others, places = three()
    router = fit(adapters, others)
    question = places[0] + 0.2 * places[1]  # for `it`; of the others `returns` is the nearest
    whole = router.route(question)
    assert whole.adapter == "it"
    for allowed in ({"returns"}, set[str]()):
        found = router.route(question, allowed)
        assert found.adapter is None, "chosen among all, and then masked"
        assert set(found.scores) == {*allowed, None}, "an adapter that may not be used has no score"
        assert sum(found.scores.values()) == pytest.approx(1)
        assert all(found.scores[name] == pytest.approx(whole.scores[name]) for name in allowed)
        assert found.probability == pytest.approx(found.scores[None]), "of that nothing it may use answers"
    own = router.route(places[1], {"returns"})
    assert own == replace(router.route(places[1]), scores=own.scores) and own.adapter == "returns"


def test_what_an_adapters_data_declines_is_for_none() -> None:
    adapters, others, places = three()
    declined = cloud(places[3] + places[0], 30, 7)  # nearer to it than to anything else
    before = fit(adapters, others).route(places[3] + places[0])
    adapters["it"] = replace(adapters["it"], train_declined=declined, valid_declined=declined[:5])
    after = fit(adapters, others).route(places[3] + places[0])
    assert before.adapter == "it" and after.adapter is None


def test_an_adapter_with_few_questions_weighs_as_much() -> None:
    adapters, others, places = three()
    middle = fit(adapters, others).route((places[0] + places[1]) / 2)
    assert 0.3 < middle.scores["it"] / middle.scores["returns"] < 3, "40 questions against 160"


def test_a_router_is_kept_and_read_back() -> None:
    adapters, others, places = three()
    router = fit(adapters, others, "key")
    back = Router.from_bytes(router.to_bytes(), "here")
    assert back.route(places[1]) == router.route(places[1])
    assert (back.key, back.threshold, back.names) == ("key", router.threshold, router.names)
    for damaged in (b"", router.to_bytes()[:-9], b"\x00" * 64):
        with pytest.raises(FormatError, match="trained again"):
            Router.from_bytes(damaged, "here")


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(AdapterError, match="--learn"):
        fit({}, torch.zeros(4, 3))


@pytest.mark.slow
def test_the_built_in_desks_are_told_apart(real_base: Base) -> None:
    examples = read_examples("builtin")

    def of(desk: str, split: tuple[Example, ...]) -> list[Example]:
        return [one for one in split if (one.group or "none").partition(".")[0] in (desk, "none")]

    desks = ("advice", "it", "returns")
    kept = {desk: Features.of(real_base, of(desk, examples.train), of(desk, examples.valid)) for desk in desks}
    router = fit({desk: one for desk, one in kept.items() if one}, features_of(real_base, elsewhere()))
    asked = [(question_of(one.messages), (one.group or "none").partition(".")[0]) for one in examples.test]
    told = [router.route(row).adapter or "none" for row in features_of(real_base, [text for text, _ in asked])]
    right = [(one == desk, desk == "none") for one, (_, desk) in zip(told, asked, strict=True)]
    inside, outside = [ok for ok, none in right if not none], [ok for ok, none in right if none]
    assert sum(inside) >= 0.95 * len(inside) and sum(outside) >= 0.9 * len(outside)


def test_training_does_not_stop_where_a_step_fails() -> None:
    """Steps of a line search that are broken off after one try gain nothing for ever: adapters that decline the same
    questions led there."""
    adapters, others, places = three()
    crowd = cloud((places[0] + places[1] + places[3]) / 3, 120, 3)
    crowded = {name: replace(one, train_declined=crowd, valid_declined=crowd[:9]) for name, one in adapters.items()}
    router = fit(crowded, others)
    assert router.right > 0.9 and router.kept_out > 0.9 and router.route(places[0]).probability > 0.9


def test_features_are_kept_and_read_back() -> None:
    base = base_of()
    train = [example(f"Question {i}?") for i in range(12)] + [example("Who sings?", True)]
    found = Features.of(base, train, train[:3], most=5)
    assert found is not None
    assert [len(found.train), len(found.valid), len(found.train_declined), len(found.valid_declined)] == [4, 2, 1, 0]
    back = Features.from_bytes(found.to_bytes(), "here")
    assert (back.base, back.depths) == (base.identity, depths(base))
    assert torch.equal(back.train, found.train) and torch.equal(back.train_declined, found.train_declined)
    assert Features.of(base, [Example((Message("text", "a story"),), "here")] * 5, []) is None, "it asks nothing"
    for damaged in (b"", found.to_bytes()[:-9]):
        with pytest.raises(FormatError, match="--learn"):
            Features.from_bytes(damaged, "here")


def test_a_question_is_what_the_user_said() -> None:
    said = [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert question_of(said) == "a\nc"


def test_long_questions_keep_their_beginning_and_end() -> None:
    ids = token_ids(base_of(), "a" * 500 + "b" * 500)
    assert len(ids) == 129 and ids[1] != ids[-1]


def test_the_engine_reads_questions_as_training_did() -> None:
    base, texts = base_of(), ["Where is my parcel?", "", "x" * 400]
    offline = features_of(base, texts)
    with Engine(base, slots=2) as engine:
        assert torch.allclose(engine.features(texts).result(), offline, atol=1e-4)
    assert not torch.allclose(offline[0], offline[2], atol=1e-2)


def test_a_model_without_blocks_cannot_be_routed() -> None:
    with pytest.raises(BaseError, match="name the adapter"):
        depths(Base.of(plain_module(), "plain"))


def test_questions_about_everything_are_many_and_different() -> None:
    assert len(set(elsewhere())) == len(elsewhere()) > 300


def test_work_beside_goes_on_in_turns_and_tells_its_errors() -> None:
    order: list[str] = []

    def work(name: str, fails: bool = False):  # type: ignore[no-untyped-def]
        for _ in range(3):
            order.append(name)
            yield
        if fails:
            raise ValueError("it fails")
        return name

    with Engine(base_of(), slots=2) as engine:
        assert engine.between_steps(work("a")).result() == "a"
        with pytest.raises(ValueError, match="it fails"):
            engine.between_steps(work("b", fails=True)).result()
        assert engine.features(["still there"]).result().shape[0] == 1
    assert order == ["a"] * 3 + ["b"] * 3


def test_what_cannot_be_learnt_from_is_left_out_with_the_reason() -> None:
    base = base_of()
    said = [Example((Message("user", f"Where is {i}?"), Message("assistant", "ok")), "here") for i in range(8)]
    own = Features.of(base, said[:6], said[6:])
    assert own is not None
    narrow = replace(own, train=own.train[:, :7], valid=own.valid[:, :7])
    contents = {
        "own": own,
        "elsewhere": replace(own, base="another"),
        "deeper": replace(own, depths=(2,)),
        "narrow": narrow,
    }
    files = {name: one.to_bytes() for name, one in contents.items()} | {"cut": own.to_bytes()[:-9]}
    found, left_out = learnable(files, base, own.train.shape[1])
    assert list(found) == ["own"] and list(left_out) == ["elsewhere", "deeper", "narrow", "cut"]
    assert "another base" in left_out["elsewhere"] and "damaged" in left_out["narrow"] and "--learn" in left_out["cut"]


def test_the_command_shows_scores_and_who_is_left_out(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, root = open_base(str(tiny_folder)), tmp_path / "adapters"
    asks = {"numbers": "What is {0} plus {0}{0}?", "letters": "zzzz qqqq jjjj wwww xxxx kkkk {0}", "without": None}
    for seed, (name, text) in enumerate(asks.items()):
        said = [example((text or "").format(i)) for i in range(40)]
        features = Features.of(base, said[:32], said[32:]) if text else None
        adapter = random_adapter(base, uniform(select(base.sites, ["*q_proj"]), 2, 4.0), seed, size=0.1)
        peft.write(adapter, root / name, routing=features.to_bytes() if features else None)
    (root / "notes").mkdir()
    app(["route", "What is 7 plus 77?", "--adapters", str(root), "--base", str(tiny_folder)], standalone_mode=False)
    told = capsys.readouterr().out
    assert "goes to numbers" in told and "letters" in told and "base" in told
    assert "without is left out: it keeps no questions" in told and "notes" not in told


def test_whoever_waits_no_longer_for_work_beside_ends_nothing() -> None:
    waited: list[Future[str]] = []

    def work(leaves: bool):  # type: ignore[no-untyped-def]
        while not waited:
            yield
        if leaves:
            waited[0].cancel()
        return "done"

    with Engine(base_of(), slots=2) as engine:
        waited.append(engine.between_steps(work(True)))
        assert engine.between_steps(work(False)).result(timeout=10) == "done"
