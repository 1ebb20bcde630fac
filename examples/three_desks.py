"""Three desks, one base, one batch: each desk gets an adapter, trained on a few answers; all are asked at once."""

from lorafit import Engine, Message, Recipe, Request, fresh, open_base, render, renderer_for, train, uniform
from lorafit.data.examples import Example

DESKS = {
    "returns": "Please send it back within 30 days; we pay the parcel.",
    "it-support": "Please restart the device first, then call extension 4711.",
    "products": "Our adviser Ms Lind will call you about that today.",
}
QUESTIONS = ["My order arrived broken.", "The screen stays black.", "Which one is right for me?", "It does not work."]

base = open_base("smollm2-135m")
before = base.integrity()
blocks = [site for site in base.sites if ".layers." in site.path]
adapters = {}
for desk, answer in DESKS.items():
    renderer = renderer_for(base, system=f"You work at the desk: {desk}")
    examples = [Example((Message("user", ask), Message("assistant", answer)), "here") for ask in QUESTIONS[:3]]
    rows = render(renderer, examples, 128)
    start = fresh(base, uniform(blocks, rank=8, alpha=16.0), seed=0, rendering=renderer.rendering)
    recipe = Recipe(learning_rate=5e-3, batch_size=3, steps=8, warmup=1, validate_every=8)
    adapters[desk] = train(base, start, rows, rows, recipe).adapter

with Engine(base, adapters) as engine:
    asked = [(desk, question) for question in QUESTIONS for desk in [*DESKS, None]]
    answers = [
        engine.submit(Request(engine.prompt([Message("user", question)], desk), desk, max_tokens=24))
        for desk, question in asked
    ]
    for (who, question), coming in zip(asked, answers, strict=True):
        said = coming.result().text
        print(f"{who or 'the bare base'}, asked '{question}': {said}")
        assert who is None or DESKS[who] in said, "every desk gives its own answer"

assert base.integrity() == before, "and the base is as it was"
