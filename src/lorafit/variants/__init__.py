"""Methods of low-rank adaptation: a file for each, which ends in its VARIANT, and its line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is behind it, and whoever needs the names alone must not wait for that
    from lorafit.variants.variant import Variant

NAMES = ("lora", "dora", "rslora", "pissa")


class _Variants(Mapping[str, "Variant"]):
    """By name; each file is imported when it is first asked for."""

    def __getitem__(self, name: str) -> Variant:
        if name not in NAMES:
            raise KeyError(name)
        variant: Variant = import_module(f"lorafit.variants.{name}").VARIANT
        return variant

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


VARIANTS = _Variants()
