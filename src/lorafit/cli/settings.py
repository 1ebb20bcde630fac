"""lorafit settings: everything that can be set, as a file to start from."""

from __future__ import annotations

from lorafit.cli.flags import JSON


def settings(json: JSON = False) -> None:
    """Print a TOML file with every setting, its default and what it means; with --json, the JSON schema of such files.

    \b
    lorafit settings > my.toml
    lorafit train -c my.toml
    """
    from json import dumps

    from lorafit.settings import RunFile, template

    print(dumps(RunFile.model_json_schema()) if json else template())
