"""The main job as a library: from examples to an adapter that is compared with its base. A few minutes on two cores."""

from lorafit import TrainSettings, compare, decide, fresh, open_base, read_examples, render, renderer_for, train

base = open_base("smollm2-135m")
examples = read_examples("builtin")  # or your own file or folder
renderer = renderer_for(base, system="Help desk")
rows = {name: render(renderer, split, 512) for name, split in examples.by_name().items()}

decision = decide(base, rows["train"], TrainSettings(epochs=0.05, validations=1))
for choice in decision.choices:
    print(f"{choice.name}: {choice.value}, because {choice.reason}")

start = fresh(base, decision.plan, seed=0, rendering=renderer.rendering)
trained = train(base, start, rows["train"], rows["valid"][:12], decision.recipe, tell=print)
result = compare(base, trained.adapter, renderer, examples.test[:12], rows["test"][:12])
print(result.nll)
assert result.nll.ci95 and result.nll.ci95[1] < 0, "the adapter should be better than its base after a few steps"
