"""Copies of a program, with its own instructions and demonstrations or with others."""

from __future__ import annotations

import dspy

from preceptor.errors import ConfigError
from preceptor.lm.seam import predictors
from preceptor.scoring.trial import Candidate


def candidate_of(program: dspy.Module) -> Candidate:
    """Return a program's instructions."""
    return Candidate({name: str(predictor.signature.instructions) for name, predictor in predictors(program)})


def apply(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """Return a copy of `program` with the candidate's instructions and demonstrations; the original stays as it is."""
    copied = copy_of(program)
    for name, predictor in predictors(copied):
        predictor.signature = predictor.signature.with_instructions(candidate.instructions[name])
        if name in candidate.demos:
            predictor.demos = [dspy.Example(dict(demo)) for demo in candidate.demos[name]]
    return copied


def copy_of(program: dspy.Module) -> dspy.Module:
    """Return a copy; DSPy copies one predictor under two names twice where something beside it can't be copied.

    Raises:
        ConfigError: If one that is deeper within the program came out twice.
    """
    copied = program.deepcopy()
    first: dict[int, str] = {}
    for name, value in vars(program).items():
        setattr(copied, name, getattr(copied, first.setdefault(id(value), name)))
    names, found = ([name for name, _ in predictors(each)] for each in (program, copied))
    if names != found:
        raise ConfigError(
            f"The program can't be copied: the predictors {', '.join(names)} became {', '.join(found)}. One is shared "
            "by several of its parts, beside something that can't be copied, such as a lock; make that a global, or "
            "give the class a __deepcopy__."
        )
    return copied
