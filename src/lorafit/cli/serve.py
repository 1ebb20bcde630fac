"""lorafit serve: a base and its adapters behind OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import NAMED, UNKNOWN_BASE, by_name, require_folder_of_adapters


def serve(
    base: Annotated[str, typer.Argument(help="The base: smollm2-135m, a model folder, a .gguf file, or a hub id.")],
    adapter: NAMED = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters, one folder NAME/ each; it is watched for new ones.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="The file of keys, made by lorafit key create.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A host name that clients use, such as a proxy's; may be repeated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 16,
    room: Annotated[int | None, typer.Option(min=2, help="Most tokens of a prompt with its answer.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 1024,
    eight_bit: Annotated[bool, typer.Option("--eight-bit", help="Use 8-bit weights, made in memory.")] = False,
    accept_unknown_base: UNKNOWN_BASE = False,
    ask_alone: Annotated[
        bool,
        typer.Option("--ask-alone", help="Send adapters trained on single questions only the last question."),
    ] = False,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to finish answers after a signal to stop.")] = 30.0,
) -> None:
    """Serve a base and its adapters through OpenAI's API, or classifiers through /classify in vLLM's form.

    \b
    lorafit serve smollm2-135m returns=runs/returns
    lorafit serve smollm2-135m --adapters adapters/ --keys keys.json --host 0.0.0.0
    lorafit serve smollm2-135m reviews=runs/reviews     # a classifier
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.errors import SettingsError
    from lorafit.server.address import hosts_of, listening
    from lorafit.server.keys import read

    named = {name: Path(folder) for name, folder in by_name(adapter, "ADAPTER").items()}
    require_folder_of_adapters(adapters)
    require(adapters=named.values())
    labels = _labels(named)
    if labels:
        idle = {
            "--adapters": adapters,
            "--slots": slots != 16,
            "--room": room,
            "--queue": queue != 1024,
            "--eight-bit": eight_bit,
            "--ask-alone": ask_alone,
        }
        if given := [flag for flag, is_given in idle.items() if is_given]:
            raise SettingsError(f"{', '.join(given)}: does nothing for classifiers: leave it out")
    if labels:
        require(base=base, settings={"task": "classification"})
    else:
        require(base=base, adapters=named.values(), writes=True)
    hosts = hosts_of(host, allowed_host or [], keys is not None)
    if keys is not None:
        read(keys)
    sockets = listening(host, port)
    from lorafit.bases.base import Base, open_base

    try:
        from lorafit.server.classifiers import ClassifierService
        from lorafit.server.run import Log, serve
        from lorafit.server.service import Service
    except ImportError as error:
        raise SettingsError(
            f"lorafit serve: {error.name} is missing: pip install '.[serve]' in a clone, or the wheel with [serve]"
        ) from error
    from lorafit.serving import Engine

    terminal = Terminal(False)

    def opened(labels: int | None = None) -> Base:
        return open_base(base, None, terminal.say, terminal.watch, labels)

    def engine() -> Engine:
        return Engine(
            opened(),
            slots=slots,
            room=room,
            queue=queue,
            eight_bit=eight_bit,
            accept_unknown_base=accept_unknown_base,
        )

    served = Path(base).name if Path(base).exists() else base
    service: Service | ClassifierService
    if labels:
        service = ClassifierService(served, opened, named, keys, terminal.say, accept_unknown_base)
    else:
        service = Service(served, engine, named, adapters, keys, terminal.say, ask_alone)
    where = f"[{host}]" if ":" in host else host
    path = "/classify" if labels else "/v1"
    terminal.say(
        f"http://{where}:{sockets[0].getsockname()[1]}{path} serves '{served}' once it is open; Ctrl-C stops it"
    )
    serve(service, sockets, hosts, drain, Log())


def _labels(adapters: Mapping[str, Path]) -> bool:
    """Whether the adapters are classifiers. Raises SettingsError where only some are."""
    from lorafit.adapters.folder import CLASSIFICATION, task_of_head
    from lorafit.errors import SettingsError

    tasks = {name: task_of_head(folder) for name, folder in adapters.items()}
    labels = [name for name, task in tasks.items() if task == CLASSIFICATION]
    others = [name for name in tasks if name not in labels]
    if labels and others:
        other, task = others[0], tasks[others[0]]
        what = "writes text: start a server for each kind"
        if task is not None:
            what = f"is for the task '{task}', which is not served: leave it out"
        raise SettingsError(f"'{labels[0]}' is a classifier, and '{other}' {what}")
    return bool(labels)
