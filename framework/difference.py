"""The difference of two programs, line by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from preceptor.program import Artifact

_MATCHED_LINES: Final = 5_000
"""Lines of a text up to which a diff looks for those in common; the time it takes grows with their square."""


def compared(before: Artifact, after: Artifact) -> str:
    """Return a unified diff of two saved programs' instructions, expert by expert, "" where they are equal.

    Where only one of them has an expert, it is compared with what answers in its place in the other.
    """
    experts = dict.fromkeys([*before.predictors, *after.predictors])
    if before.is_routed or after.is_routed:
        experts.pop("", None)
    return diff(before.instructions_of(experts), after.instructions_of(experts))


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return a unified diff of two programs' instructions, "" where they are equal.

    Example:
        >>> print(diff({"predict": "Sort."}, {"predict": "Sort by queue."}))
        --- predict
        +++ predict
        @@ -1 +1 @@
        -Sort.
        +Sort by queue.
    """
    names = sorted({*before, *after})
    parts = [_compared(name, before.get(name, ""), after.get(name, "")) for name in names]
    return "\n".join(line for part in parts for line in part)


def _compared(name: str, before: str, after: str) -> Iterable[str]:
    old, new = before.splitlines(), after.splitlines()
    if before == after or max(len(old), len(new)) <= _MATCHED_LINES:
        return difflib.unified_diff(old, new, name, name, lineterm="") if before != after else ()
    head = (f"--- {name}", f"+++ {name}", f"@@ -1,{len(old)} +1,{len(new)} @@")
    return (*head, *(f"-{line}" for line in old), *(f"+{line}" for line in new))
