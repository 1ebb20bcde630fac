"""Questions answered from the guide, by search: the section that fits best, or that the guide does not know.

Sections are ranked by BM25 (Robertson and Zaragoza 2009) over stemmed words, and by their headings. One answers when
it holds enough of the question: words weigh by their rarity in the guide, and one that the guide does not have weighs
most. So a question about something else is told from one in other words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

GUIDE = ("lora", "using", "choosing", "data", "report", "when-not", "glossary")  # in the order in which they are read
REFERENCE = ("verbs", "pages")  # a section for every verb and for every page of the docs, found where one is named
PAGES = (*GUIDE, *REFERENCE)
ENOUGH = 0.4  # share of a question's weight that a section must hold; calibrated on tests/test_explain.py
BESIDE = 0.6  # what a word counts towards it that stands in the text and not in the heading
HEADING = 3.0  # how much more a heading tells than a text
ASIDE = 0.5  # what the opening of a page counts against its sections, and a definition where more is asked than a word
NEAREST = 3
_K, _B = 1.2, 0.6  # BM25: how soon a repeated word counts no more, and how much length counts

ENDINGS = (("ings", "ing", "ies", "ied", "ed", "es", "s"), ("ation", "ion", "iz", "at", "er", "ity", "ly", "e", "y"))
_SAYS_NOTHING = """
a about actually am an and any are as at bad be been being between but by can could did difference do does doing else
exactly explain for from get give given go goes going good had happen happens has have having help her here his how i
if in into is it its just kind let like lorafit make may me mean means might my need no now of off ok on one or our
please prove s say says see set shall she should show sit so some still than that the their them then there these they
thing this those to us use used using very want was way we were what when where which why will with work works would you
your
"""
STOP = frozenset(_SAYS_NOTHING.split())
# What the guide calls a thing, and what others call it.
_NAMES = {
    "learning rate": "lr",
    "data": "dataset",
    "example": "sample row",
    "nll": "loss perplexity likelihood",
    "diverge": "explode nan",
    "interval": "confidence significant significance pvalue",
    "paired": "statistically",
    "retrieval": "rag",
    "model": "llm",
    "layer": "module",
    "weight": "matrix matrices",
    "memory": "ram vram",
    "train": "finetune finetuning tune tuning",
    "learn": "teach",
    "overfit": "memorise memorize",
    "bf16": "bfloat16",
    "fp32": "float32",
    "leak": "contamination",
    "label": "classification classify classifier category class",
    "legal": "lawyer contract",
    "medical": "doctor",
    "invent": "hallucinate hallucination",
    "right": "accuracy",
    "forget": "catastrophic",
    "many": "enough much",
    "curve": "chart plot graph",
    "level": "student pupil",
    "private": "privacy confidential",
    "written": "synthetic",
    "unbalanced": "imbalanced",
    "repeat": "reproducible",
    "cut": "truncated",
    "trackio": "wandb",
}
SAME = {said: name for name, others in _NAMES.items() for said in others.split()}
# Questions that ask about a verb, where the word in them is one ("what does trim do").
_ABOUT_VERBS = re.compile(
    "|".join(
        f"(?:{one})"
        for one in (
            r"VERB(?: command| verb)?",
            r"(?:explain|describe|tell me about) VERB(?: command| verb)?",
            r"what (?:is|are) VERB(?: command| verb| (?:command |verb )?(?:good )?for)",
            r"what (?:does|do) VERB(?: command| verb)? do",
            r"how (?:do i|do you|can i|to) use VERB(?: command| verb)?",
            r"how does VERB(?: command| verb)? work",
        )
    ).replace("VERB", r"(?:the )?(?:lorafit )?([a-z]+)")
)
_ABOUT_PAGES = re.compile(r"\b(?:pages?|docs?|documentation)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Section:
    """A piece of the guide under one heading, up to the next. `text` is Markdown without the heading."""

    page: str
    title: str
    heading: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What the guide says to a question. `section` is None where it does not know; `see_also` holds what is near."""

    question: str
    section: Section | None
    see_also: tuple[Section, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every section of the guide that comes with the package, in order."""
    return tuple(section for page in PAGES for section in _split(page))


def _split(page: str) -> list[Section]:
    """Sections in order; a `#` within a block of code is no heading. What comes before the first is under the title."""
    text = files("lorafit").joinpath("guide", f"{page}.md").read_text(encoding="utf-8")
    headed: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"#{1,3} (.+)", line)
        if heading:
            headed.append((heading[1], []))
        else:
            headed[-1][1].append(line)
    said = [(heading, "\n".join(lines).strip()) for heading, lines in headed]
    return [Section(f"{page}.md", said[0][0], heading, text) for heading, text in said if text and heading != "Sources"]


def words(text: str) -> list[str]:
    """The words that carry meaning, made alike: lower case, without endings, by the guide's own name for the thing."""
    plain = (
        re.sub(r"https?://\S+|[`*_|]", " ", text.lower())
        .replace("-", " ")
        .replace("fine tun", "finetun")
        .replace("p value", "pvalue")
        .replace("warm up", "warmup")
    )
    found = []
    for word in re.findall(r"[a-z]+\d*|\d+(?:\.\d+)?", plain):
        for said in SAME.get(word, SAME.get(word.removesuffix("s"), word)).split():
            if said not in STOP and (len(said) > 1 or said.isdigit()):
                found.append(_stem(said))
    return found


def _stem(word: str) -> str:
    """The word without the endings of number and tense, then of kind; British and American spelling made one."""
    if not word.isalpha():
        return word
    word = word.replace("ise", "ize").replace("isa", "iza").replace("learnt", "learn").replace("chosen", "choose")
    for endings in ENDINGS:
        ending = next((end for end in endings if word.endswith(end) and len(word) - len(end) >= 3), "")
        word = word.removesuffix(ending)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls" else word


@dataclass(frozen=True)
class _Index:
    """Sections; the words of each, with the heading's; of every heading; and the weight of each word (BM25's idf)."""

    sections: tuple[Section, ...]
    texts: tuple[Counter[str], ...]
    headings: tuple[frozenset[str], ...]
    weight: dict[str, float]

    def of(self, found: Iterable[str]) -> float:
        """Weight of the words together; one that the guide does not have weighs as the rarest."""
        rarest = max(self.weight.values())
        return sum(self.weight.get(word, rarest) for word in found)

    def score(self, i: int, asked: Sequence[str]) -> float:
        """BM25 of section i, and more where its heading holds what is asked and little else."""
        text, heading = self.texts[i], self.headings[i]
        mean = sum(one.total() for one in self.texts) / len(self.texts)
        room = _K * (1 - _B + _B * text.total() / mean)
        said = sum(self.weight[w] * text[w] * (_K + 1) / (text[w] + room) for w in asked if w in text)
        named = self.of(w for w in asked if w in heading)
        score = said + (HEADING * named * named / self.of(heading) if heading else 0.0)
        section = self.sections[i]
        aside = section.heading == section.title or (section.page == "glossary.md" and not heading.issuperset(asked))
        return ASIDE * score if aside else score

    def knows(self, asked: Sequence[str]) -> bool:
        """Whether the guide has more than half of the words ("install Docker" is not about lorafit); a word that is
        asked alone, in a heading ("set the table")."""
        if len(asked) == 1:
            return any(asked[0] in heading for heading in self.headings)
        return 2 * sum(word in self.weight for word in asked) > len(asked)

    def holds(self, i: int, asked: Sequence[str]) -> float:
        """Share of the question, by weight, that section i holds; what its heading lacks counts less."""
        text, heading = self.texts[i], self.headings[i]
        held = self.of(w for w in asked if w in heading) + BESIDE * self.of(
            w for w in asked if w in text and w not in heading
        )
        return held / self.of(asked)


@cache
def _index(pages: tuple[str, ...]) -> _Index:
    of_pages = tuple(section for section in sections() if section.page.removesuffix(".md") in pages)
    headings = tuple(frozenset(words(section.heading)) for section in of_pages)
    texts = tuple(Counter(words(f"{section.heading}\n{section.text}")) for section in of_pages)
    held = Counter(word for text in texts for word in text)
    n = len(texts)
    weight = {word: math.log(1 + (n - k + 0.5) / (k + 0.5)) for word, k in held.items()}
    return _Index(of_pages, texts, headings, weight)


def answer(question: str) -> Answer:
    """The section that fits the question best, and those nearest to it; no section where none fits.

    A verb that is named (`lorafit trim`, `trim` alone, "what does trim do") and a page of the docs are answered from
    the reference, all else from the guide.
    """
    named = _named(question)
    if named is None and _ABOUT_PAGES.search(question):
        found = _searched(_ABOUT_PAGES.sub(" ", question), _index(("pages",)))
        if found[0] is not None:
            return Answer(question, *found)
    section, near = _searched(question, _index(GUIDE))
    if named is not None:
        near = tuple(one for one in (section, *near) if one is not None)[:NEAREST]
    return Answer(question, named or section, near)


def _named(question: str) -> Section | None:
    """The section of the verb, or of the page of the docs, that the question names."""
    plain = re.sub(r"[`\"'?!]", "", question).strip()
    asked = _ABOUT_VERBS.fullmatch(" ".join(plain.lower().split()))
    word = next(filter(None, asked.groups()), "") if asked else ""
    for section in sections():
        verb = section.heading.removeprefix("lorafit ") if section.page == "verbs.md" else ""
        path = section.text.partition(". ")[0] if section.page == "pages.md" else ""
        if verb and (word in (verb, f"{verb}er", f"{verb}r") or re.search(rf"\blorafit {verb}\b", plain.lower())):
            return section
        if path.endswith(".md") and path in plain:
            return section
    return None


def _searched(question: str, index: _Index) -> tuple[Section | None, tuple[Section, ...]]:
    """The section of an index that holds enough of the question, and those nearest to it."""
    asked = [w for w in dict.fromkeys(words(question)) if not w.replace(".", "").isdigit()]  # 500 of what, is asked
    scores = [index.score(i, asked) for i in range(len(index.texts))]
    near = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: -scores[i])[: NEAREST + 1]
    best = next((i for i in near if index.knows(asked) and index.holds(i, asked) >= ENOUGH), None)
    others = tuple(index.sections[i] for i in near if i != best)[:NEAREST]
    return None if best is None else index.sections[best], others
