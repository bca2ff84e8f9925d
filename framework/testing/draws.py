"""Chance by hashing: what is drawn depends on the parts given and on nothing else."""

from __future__ import annotations

import hashlib
import json


def draw(*parts: object) -> bytes:
    """Return 32 even bytes that depend on the parts, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def number(drawn: bytes) -> int:
    """Return an integer in [0, 2**48)."""
    return int.from_bytes(drawn[:6], "big")


def uniform(drawn: bytes) -> float:
    """Return a number in [0, 1)."""
    return number(drawn) / 2**48
