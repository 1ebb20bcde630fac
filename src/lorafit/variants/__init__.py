"""Methods of low-rank adaptation. Each has a file, which ends with its VARIANT, and an entry in NAMES."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the module imports torch, which code that needs only the names should not wait for
    from lorafit.variants.variant import Variant

NAMES = ("lora", "dora", "rslora", "pissa")


class _Variants(Mapping[str, "Variant"]):
    """The methods by name. Each file is imported when its method is first looked up."""

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
