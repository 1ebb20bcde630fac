"""Digests of values: SHA-256 over JSON, in which a dataclass is its fields that are not at their defaults.

A field that is added later, with a default that means what was meant before it, changes no digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

FORMAT = 2  # of what a digest is taken over; raise it when that changes, and keep the older ones readable


def canonical(value: Any) -> str:
    """Numbers, text, mappings, sequences and dataclasses as JSON; equal values give equal text."""
    return json.dumps(value, default=_set_fields, sort_keys=True, separators=(",", ":"))


def digest_of(value: Any) -> str:
    """`2:`, the format, and 64 hexadecimal digits."""
    return f"{FORMAT}:{hashlib.sha256(canonical(value).encode()).hexdigest()}"


def digest_of_format_1(value: Any) -> str:
    """As runs of before have it, over the value as Python printed it then, and no format before it. Fields that have
    come since are not printed."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _set_fields(value: Any) -> dict[str, Any]:
    return {one.name: part for one in fields(value) if (part := getattr(value, one.name)) != one.default}
