"""lorafit settings: a file with all settings and their defaults."""

from __future__ import annotations

from lorafit.cli.flags import JSON


def settings(json: JSON = False) -> None:
    """Print a TOML file with every setting, its default and its meaning. With --json: the JSON schema of such files.

    \b
    lorafit settings > my.toml
    lorafit train -c my.toml
    """
    from json import dumps

    from lorafit.settings import RunFile, template

    print(dumps(RunFile.model_json_schema()) if json else template())
