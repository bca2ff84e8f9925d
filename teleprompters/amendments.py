"""How a constitution is amended: a proposer explains a wrong answer, chooses one edit, and writes its text.

The method is ConstitutionalExperts; see `preceptor.teleprompters.constitutional_experts`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from string import Template
from typing import Any, Final

from preceptor.constitution import Constitution, Edit
from preceptor.leaks import Guard, count_words
from preceptor.lm.adapter import DirectAdapter, choices, is_direct
from preceptor.scoring.trial import Candidate, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompters.reading import RIGHT, parse

_CASE: Final = """\
A language model is given these instructions:

$instructions

It got this case wrong:

$case

"""

EXPLAIN: Final = Template(
    _CASE
    + """\
Explain in one or two sentences, in general terms, what kind of input this is, why the right answer is right for it, \
and what the instructions fail to say. Write the explanation between <START> and <END>."""
)
"""Ours: the library's feedback, in one request for each error."""

CHOOSE: Final = Template(
    _CASE
    + """\
The explanation is this: $because

One of these edits is made:

$menu

Which one mends this best, and harms other cases least? Answer with its number only."""
)
"""Ours, after the library's numbered list of mutations."""

WRITE: Final = Template(
    _CASE
    + """\
The explanation is this: $because

$request
A principle is one sentence of at most $words words that names a kind of input in general terms, and copies no \
example. It has this form: If ..., $then
Write it between <START> and <END>."""
)
"""Ours: one request for the text of an added, revised or merged principle."""

REQUESTS: Final = {
    "add": Template("Write one new principle that is to be added to the instructions and mends this."),
    "revise": Template("Rewrite this principle of the instructions so that it mends this: $principles"),
    "merge": Template("Write one principle that says what these two say, and mends this:\n$principles"),
}
OPTIONS: Final = {
    "add": Template("Add a new principle."),
    "revise": Template("Revise this principle: $principles"),
    "remove": Template("Remove this principle: $principles"),
    "merge": Template("Merge these two principles into one:\n$principles"),
}

_ITEM: Final = re.compile(r"\n\s*(?:\d+[.)]|[-*])\s+")
"""The start of a list's item."""

_LABEL: Final = re.compile(r"^[\s*#]*(?:new |revised |merged )?principle(?: \d+)?\s*:[\s*]*", re.IGNORECASE)
"""A label before a principle."""

_SENTENCE: Final = re.compile(r".+?(?:[.!?](?=\s)|[。！？]|\Z)\s*", re.DOTALL)  # noqa: RUF001  Chinese
"""A sentence, and the space behind it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a constitution may grow to.

    Attributes:
        principles: None is added beyond so many.
        words: Most of a principle that is written.
    """

    principles: int
    words: int


class Workshop:
    """Where the constitutions of one predictor are amended; nothing is made twice.

    Args:
        task: The compile.
        name: The predictor.
        first: What the search begins with.
        sampling: How the proposer answers.
        bounds: Of every constitution.
    """

    def __init__(self, task: Task, name: str, first: Candidate, sampling: Sampling, bounds: Bounds) -> None:
        self._task = task
        self._name = name
        self._made = {first.key}
        self._born: dict[str, tuple[_Case, Edit, int]] = {}
        self._identities = count(first.constitutions[name].newest + 1)
        self._guard = Guard.of(task.train, task.signatures)
        self._sampling = sampling
        self._bounds = bounds

    def children(self, wrong: Sequence[tuple[Candidate, str]], edits: int) -> list[Candidate]:
        """Return the constitutions that so many edits against each wrong answer lead to."""
        made: list[Candidate] = []
        cases = self._explained(wrong)
        for case, edit in self._written(self._chosen(cases, edits)):
            identity = next(self._identities) if edit.kind == "add" else 0
            child = self._child(case, edit, identity)
            if child.key not in self._made:
                self._made.add(child.key)
                self._born[child.key] = case, edit, identity
                self._task.made(child, case.parent, self._name, edit.kind, case.because)
                made.append(child)
        return made

    def joined(self, ranked: Sequence[Trial]) -> list[Candidate]:
        """Return, for each parent that several of these beat, the constitution with all those edits; no call.

        Args:
            ranked: Best first, on the same rows; a parent that isn't among them was beaten.
        """
        scores, found = {trial.candidate.key: trial.score for trial in ranked}, list[Candidate]()
        families: dict[str, list[tuple[_Case, Edit, int]]] = {}
        for trial in ranked:
            if trial.candidate.key in self._born:
                case, edit, identity = self._born[trial.candidate.key]
                if trial.score > scores.get(case.parent.key, -1.0):
                    families.setdefault(case.parent.key, []).append((case, edit, identity))
        for edits in families.values():
            together = self._together(edits)
            if together.key not in self._made:
                self._made.add(together.key)
                because = " ".join(case.because for case, _, _ in edits)
                self._task.made(together, edits[0][0].parent, self._name, "join", because)
                found.append(together)
        return found

    def _together(self, edits: Sequence[tuple[_Case, Edit, int]]) -> Candidate:
        """Return their parent after all of the edits that leave each other's principles alone."""
        parent, touched = edits[0][0].parent, set[int]()
        constitution = parent.constitutions[self._name]
        for case, edit, identity in edits:
            is_known = any(one.text == edit.text for one in constitution.principles)
            is_full = edit.kind == "add" and len(constitution.principles) >= self._bounds.principles
            if not (is_known or is_full or touched & set(edit.of)):
                constitution = constitution.edited(edit, identity, case.because)
                touched |= set(edit.of)
        return parent.with_constitution(self._name, constitution)

    def _explained(self, wrong: Sequence[tuple[Candidate, str]]) -> list[_Case]:
        """Ask what led to each wrong answer; return those that were explained."""
        cases = [_Case(parent, parent.constitutions[self._name], shown) for parent, shown in wrong]
        prompts = [self._prompt(EXPLAIN, case) for case in cases]
        said = [parse(text or "") for text in self._task.draw(prompts, self._sampling)]
        return [replace(case, because=_line(texts[0])) for case, texts in zip(cases, said, strict=True) if texts]

    def _chosen(self, cases: Sequence[_Case], edits: int) -> list[tuple[_Case, Edit]]:
        """Ask for so many edits against each case; only additions are made twice."""
        menus = [self._menu(case) for case in cases]
        chosen: list[tuple[_Case, Edit]] = []
        for _ in range(edits):
            shuffled = [self._task.rng.sample(menu, len(menu)) for menu in menus]
            asked = [
                (self._prompt(CHOOSE, case, menu=_listed(case, menu)), [str(at) for at in range(1, len(menu) + 1)])
                for case, menu in zip(cases, shuffled, strict=True)
                if len(menu) > 1
            ]
            answers = iter(self._task.choose(asked, self._sampling))
            for case, menu, left in zip(cases, shuffled, menus, strict=True):
                if menu:
                    edit = self._picked(menu, next(answers) if len(menu) > 1 else None)
                    chosen.append((case, edit))
                    left[:] = [one for one in left if one != edit or one.kind == "add"]
        return chosen

    def _menu(self, case: _Case) -> list[Edit]:
        """Return what can be done to a constitution; no removal that leads back to one that was made."""
        edits = case.constitution.edits(self._bounds.principles)
        return [edit for edit in edits if edit.kind != "remove" or self._child(case, edit).key not in self._made]

    def _child(self, case: _Case, edit: Edit, identity: int = 0) -> Candidate:
        return case.parent.with_constitution(self._name, case.constitution.edited(edit, identity, case.because))

    def _picked(self, menu: Sequence[Edit], answer: str | None) -> Edit:
        """Return the edit whose number an answer gives first; one at random if it gives none that is on the menu."""
        found = re.search(r"\d+", answer or "")
        at = int(found[0]) if found and len(found[0]) < 4 else 0
        return menu[at - 1] if 1 <= at <= len(menu) else self._task.rng.choice(menu)

    def _written(self, chosen: Sequence[tuple[_Case, Edit]]) -> list[tuple[_Case, Edit]]:
        """Ask for the texts; return the edits that got one they can have, and the removals, which need none."""
        words = self._bounds.words
        prompts = [
            self._prompt(WRITE, case, request=_told(REQUESTS, case, edit), words=words, then=self._then(case))
            for case, edit in chosen
            if edit.kind != "remove"
        ]
        answers = iter(self._task.draw(prompts, self._sampling))
        made: list[tuple[_Case, Edit]] = []
        for case, edit in chosen:
            text = "" if edit.kind == "remove" else principle(next(answers) or "", words)
            if edit.kind == "remove" or any(self._guard.originals([text])):
                made.append((case, replace(edit, text=text)))
        return made

    def _then(self, case: _Case) -> str:
        """Return how a principle is to end: in the right answer, if it is a label that the predictor may pick."""
        [signature, *others] = self._task.signatures.values()
        right = case.shown.rpartition(f"{RIGHT}: ")[2]
        is_label = not others and is_direct(signature) and right in choices(signature)
        return f"the answer is {right}." if is_label else "then ..."

    def _prompt(self, template: Template, case: _Case, **others: Any) -> str:
        """Return a meta-prompt with a case; the instructions are shown as the model reads them."""
        signature = self._task.signatures[self._name].with_instructions(case.constitution.text)
        told = DirectAdapter().format_system_message(signature) if is_direct(signature) else case.constitution.text
        return template.substitute(instructions=told, case=case.shown, because=case.because, **others)


@dataclass(frozen=True, slots=True)
class _Case:
    """A wrong answer under a constitution, and the explanation."""

    parent: Candidate
    constitution: Constitution
    shown: str
    because: str = ""


def principle(text: str, words: int) -> str:
    r"""Return the principle a proposer wrote, as one line; "" if it wrote none of at most so many words.

    Of a list the first item counts. What goes beyond is left out, sentence by sentence.

    Example:
        >>> principle("Sure!\n<START>\n1. Broken items go to returns. Be kind.\n<END>", 6)
        'Broken items go to returns.'
    """
    items = _ITEM.split("\n" + next(iter(parse(text)), ""))
    body = next((item for item in map(_line, items) if item), "")
    sentences = _SENTENCE.findall(_LABEL.sub("", body))
    fitting = ["".join(sentences[:at]).strip() for at in range(1, len(sentences) + 1)]
    return next((part for part in reversed(fitting) if count_words(part) <= words), "")


def _told(templates: Mapping[str, Template], case: _Case, edit: Edit) -> str:
    texts = [case.constitution.principle(identity).text for identity in edit.of]
    return templates[edit.kind].substitute(principles="\n".join(texts))


def _listed(case: _Case, menu: Sequence[Edit]) -> str:
    return "\n".join(f"{number}. {_told(OPTIONS, case, edit)}" for number, edit in enumerate(menu, start=1))


def _line(text: str) -> str:
    return " ".join(text.split())
