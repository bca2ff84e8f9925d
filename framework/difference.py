"""The difference of two programs, line by line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias

from preceptor.program import Artifact

_MATCHED_LINES: Final = 5_000
"""Lines of a text up to which a diff looks for those in common; the time it takes grows with their square."""

_MATCHED_WORDS: Final = 2_000
"""The same of `edits`."""

_ALIKE: Final = 0.5
"""Share of two texts' words in common (`difflib`'s ratio), below which they are shown one after the other."""

_WORD: Final = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")

Edit: TypeAlias = tuple[Literal["same", "gone", "new"], str]


def compared(before: Artifact, after: Artifact) -> str:
    """Return a unified diff of two saved programs, expert by expert, "" where they are equal.

    Compared are the instructions; and, where they differ, the fields with their labels, the settings of calls and
    the demonstrations. Where only one program has an expert, it is compared with what answers in its place in the
    other.
    """
    experts = dict.fromkeys([*before.predictors, *after.predictors])
    if before.is_routed or after.is_routed:
        experts.pop("", None)
    return diff(_texts(before, experts), _texts(after, experts))


def _texts(program: Artifact, experts: Iterable[str]) -> dict[str, str]:
    """Return all of a program as texts, by what they say."""
    texts = program.instructions_of(experts)
    for name, saved in program.answering(experts).items():
        fields = {side: saved[side] for side in ("inputs", "outputs")}
        texts[f"{name}, fields"] = "\n".join(
            f"{field}: {_json(info)}" for side in fields.values() for field, info in side.items()
        )
        texts[f"{name}, settings"] = _json(saved["config"]) if saved.get("config") else ""
        texts[f"{name}, demonstrations"] = "\n".join(map(_json, saved["demos"]))
    return texts


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


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


def edits(before: str, after: str) -> list[Edit]:
    """Return a text and what became of it as runs of words: the same, gone or new.

    Texts that have little in common, and no long run of words, are one run each, and so are very long ones.

    Example:
        >>> edits("Sort the mail.", "Sort the mail by queue.")
        [('same', 'Sort the mail'), ('new', ' by queue'), ('same', '.')]
        >>> edits("Sort the mail.", "Sort the mail. Broken things go to the workshop, all else to the desk.")[0]
        ('same', 'Sort the mail.')
        >>> edits("Sort.", "Who should read this?")
        [('gone', 'Sort.'), ('new', 'Who should read this?')]
    """
    old, new = (_WORD.findall(text) for text in (before, after))
    if max(len(old), len(new)) > _MATCHED_WORDS:
        return _runs([("gone", before), ("new", after)])
    matcher = difflib.SequenceMatcher(None, old, new)
    if matcher.ratio() < _ALIKE and _longest(matcher) < _ALIKE * min(len(old), len(new)):
        return _runs([("gone", before), ("new", after)])
    runs: list[Edit] = []
    for kind, start, stop, first, last in matcher.get_opcodes():
        if kind == "equal":
            runs.append(("same", "".join(old[start:stop])))
        else:
            runs.append(("gone", "".join(old[start:stop])))
            runs.append(("new", "".join(new[first:last])))
    return _runs(runs)


def _longest(matcher: difflib.SequenceMatcher[str]) -> int:
    """Return the length of the longest run that two texts share."""
    return max((block.size for block in matcher.get_matching_blocks()), default=0)


def _runs(runs: Iterable[Edit]) -> list[Edit]:
    return [run for run in runs if run[1]]


def _compared(name: str, before: str, after: str) -> Iterable[str]:
    old, new = before.splitlines(), after.splitlines()
    if old == new:  # other ends of lines
        old, new = before.split("\n"), after.split("\n")
    if before == after or max(len(old), len(new)) <= _MATCHED_LINES:
        return difflib.unified_diff(old, new, name, name, lineterm="") if before != after else ()
    head = (f"--- {name}", f"+++ {name}", f"@@ -1,{len(old)} +1,{len(new)} @@")
    return (*head, *(f"-{line}" for line in old), *(f"+{line}" for line in new))
