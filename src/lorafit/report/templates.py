"""The templates of the pages. They escape all data, so that text is never read as markup."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lorafit.report import words


def template(name: str) -> Template:
    """A template of this folder, in which every function of words.py is a filter."""
    environment = Environment(
        loader=PackageLoader("lorafit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {name: one for name, one in vars(words).items() if getattr(one, "__module__", "") == words.__name__},
        capitalise=lambda text: text[:1].upper() + text[1:],
    )
    environment.globals.update(aside=words.ASIDE, simple=words.SIMPLE, shown=words.shown)
    return environment.get_template(name)
