"""Your own module, loss, loop and optimizer: lorafit attaches the pairs, and that is all it does.

Here a small network that is no transformer is taught a second task without forgetting the first.
"""

from tempfile import TemporaryDirectory

import torch
from torch import nn

from lorafit import Base, TrainState, attach, fresh, read_adapter, save_adapter, select, uniform

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
x = torch.rand(512, 2) * 4 - 2
first, second = (x[:, :1] * x[:, 1:]).sin(), (x[:, :1] - x[:, 1:]).cos()

pretraining = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(300):
    nn.functional.mse_loss(net(x), first).backward()
    pretraining.step()
    pretraining.zero_grad()

base = Base.of(net, "sine")
before = base.integrity()
plan = uniform(select(base.sites, ["0", "2"]), rank=2, alpha=8)  # by the end of their paths; a typo is an error
state = TrainState(fresh(base, plan, seed=0))
optimizer = torch.optim.AdamW(state.parameters(), lr=2e-2)  # one flat fp32 parameter; any optimizer will do

with attach(base, state):
    for _ in range(400):
        loss = nn.functional.mse_loss(net(x), second)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"second task, adapted: {loss.item():.4f}")

adapter = state.freeze()  # an immutable value: hold it, compare it, save it
first_loss, second_loss = (nn.functional.mse_loss(net(x), y).item() for y in (first, second))
print(f"without the adapter: first task {first_loss:.4f}, second task {second_loss:.4f}")
with attach(base, adapter) as attached:
    adapted = net(x)
    with attached.off():
        assert torch.equal(net(x), net(x)) and not torch.equal(net(x), adapted)
assert loss.item() < second_loss / 10
assert base.integrity() == before, "the base is what it was"

with TemporaryDirectory() as folder:  # an adapter folder in PEFT's layout: whoever has the base attaches it again
    assert read_adapter(save_adapter(adapter, f"{folder}/second-task")) == adapter
