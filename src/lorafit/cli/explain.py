"""lorafit explain: answers from the guide."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON


def explain(
    question: Annotated[list[str] | None, typer.Argument(help="In plain words; none: list the guide.")] = None,
    json: JSON = False,
) -> None:
    """Answer a question from the guide, or say that the guide does not know. Exit status 0 either way."""
    from json import dumps

    from rich.console import Console

    # Not a Terminal, which also configures the libraries that open models; they are not needed here.
    out = Console(stderr=json, highlight=False, soft_wrap=json or not sys.stdout.isatty())
    asked = " ".join(question or []).strip()
    found = _told(out, asked) if asked else _listed(out)
    if json:
        print(dumps(found))


def _told(out: Any, question: str) -> dict[str, Any]:
    """Print the answer to a question; returns it."""
    from rich.markdown import Markdown
    from rich.text import Text

    from lorafit.guide.search import answer

    answered = answer(question)
    section, near = answered.section, answered.see_also
    if section is not None:
        out.print(Text(f"{section.page}: {section.heading}\n", style="bold"))
        out.print(Markdown(section.text) if out.is_terminal else Text(section.text))
    else:
        out.print(
            "The guide does not know. " + ("What comes nearest:" if near else "lorafit explain lists what it holds.")
        )
    if near:
        out.print(
            Text(("\nsee also:\n" if section else "") + "\n".join(f"  {one.page}: {one.heading}" for one in near))
        )
    said = {"page": section.page, "section": section.heading, "text": section.text} if section else {}
    return {
        "question": question,
        "answered": section is not None,
        **said,
        "see_also": [{"page": one.page, "section": one.heading} for one in near],
    }


def _listed(out: Any) -> dict[str, Any]:
    """Print the pages of the guide with their sections; returns them."""
    from rich.text import Text

    from lorafit.guide.search import sections

    pages: dict[str, dict[str, Any]] = {}
    for section in sections():
        page = pages.setdefault(section.page, {"page": section.page, "title": section.title, "sections": []})
        page["sections"].append(section.heading)
    for page in pages.values():
        out.print(Text(f"{page['page']}: {page['title']}", style="bold"))
        below = [heading for heading in page["sections"] if heading != page["title"]]
        out.print(Text("\n".join(f"  {heading}" for heading in below) + "\n"))
    out.print('lorafit explain "how many examples do I need" answers from these')
    return {"pages": list(pages.values())}
