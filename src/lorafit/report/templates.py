"""The pages: templates in which whatever data hold is text and never markup."""

from __future__ import annotations

import shlex

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lorafit.report.words import (
    ASIDE,
    SIMPLE,
    clock,
    doubt,
    interval,
    lines,
    no_classifier,
    of_checked,
    percent,
    share,
    verdict,
)


def template(name: str) -> Template:
    """A template of this folder."""
    environment = Environment(
        loader=PackageLoader("lorafit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        clock=clock,
        interval=interval,
        verdict=verdict,
        doubt=doubt,
        lines=lines,
        no_classifier=no_classifier,
        share=share,
        of_checked=of_checked,
        quoted=lambda path: shlex.quote(str(path)),
        capitalise=lambda text: text[:1].upper() + text[1:],
    )
    environment.globals.update(aside=ASIDE, simple=SIMPLE)
    return environment.get_template(name)
