"""Sends curves and scores to a tracking program through the program's library, if the user asks for it.

Each library reads its server and account from its own environment variables. It receives numbers, the name of the run
folder, and the settings that are numbers or choices, but no example, prompt or path.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lorafit.errors import SettingsError

PROJECT = "lorafit"
TENSORBOARD, WANDB = "tensorboard", "wandb"  # also the names of folders in a run folder


class Tracker(Protocol):
    """Receives numbers. Its methods may raise any error of the library."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def end(self) -> None: ...


class TensorBoard:
    """Writes event files to `tensorboard` in the run folder. To see them: tensorboard --logdir runs."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / TENSORBOARD))
        self._writer.add_text("run", "\n".join(f"    {name}: {value}" for name, value in facts.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class Trackio:
    """A run in trackio's project `lorafit`. To see it: trackio show --project lorafit."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        import trackio

        self._run = trackio.init(project=PROJECT, name=out.resolve().name, config=dict(facts), embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


class WeightsAndBiases:
    """A run in the project `lorafit` of Weights & Biases; its local files are in `wandb` in the run folder."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        import wandb

        # By default it would also record the output, the command line, and uncommitted changes in git.
        private = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=PROJECT, name=out.resolve().name, config=dict(facts), dir=str(out), settings=private
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        self._run.finish()


class MLflow:
    """A run in MLflow's experiment `lorafit`, on the server in MLFLOW_TRACKING_URI."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        import mlflow

        self._client = mlflow.MlflowClient()
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(experiment, run_name=out.resolve().name).info.run_id
        for name, value in facts.items():
            self._client.log_param(self._run, name, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def end(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: dict[str, type[TensorBoard | Trackio | WeightsAndBiases | MLflow]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def require_tracker(name: str) -> None:
    """Raise SettingsError if the library of a tracking program is not installed; `none` needs none."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise SettingsError(
            f"--report-to {name}: {name} is not installed: pip install '.[{name}]' in a clone, or the "
            f"wheel with [{name}]; or leave --report-to out"
        )
