"""Every installed method keeps to the promises of `preceptor.testing.conformance`; so does a third party's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar

import pytest

from preceptor.cli import run
from preceptor.lm.embedding import Embedder
from preceptor.teleprompters import (
    APE,
    COPRO,
    GEPA,
    ConstitutionalExperts,
    InstructZero,
    MIPROv2,
    MixtureOfExperts,
    ProTeGi,
)
from preceptor.testing import toy
from preceptor.testing.conformance import Conformance

ELSEWHERE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("everywhere", sys.argv[1])
sys.modules["everywhere"] = tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tests.compile_all(pathlib.Path(sys.argv[2]))
"""
THIRD_PARTY = str(Path(__file__).parent / "third_party")

sys.path.append(THIRD_PARTY)
METHODS = {entry.name: entry.load() for entry in entry_points(group="preceptor.teleprompters")}
sys.path.remove(THIRD_PARTY)


class TestAPE(Conformance):
    method = APE
    settings: ClassVar = {"candidates": 3, "demos": 2, "subsamples": 3}


class TestCOPRO(Conformance):
    method = COPRO
    settings: ClassVar = {"breadth": 3, "depth": 1}


class TestConstitutionalExperts(Conformance):
    method = ConstitutionalExperts
    settings: ClassVar = {"steps": 1, "errors": 2, "edits": 2}


class TestGEPA(Conformance):
    method = GEPA
    estimate_bound = 0.7  # it meets most of so few rows again, with the same instruction: nothing is asked then


class TestInstructZero(Conformance):
    method = InstructZero
    settings: ClassVar = {"start": 3, "batch": 2, "iterations": 2, "exemplars": 2}


class TestMIPROv2(Conformance):
    method = MIPROv2


class TestProTeGi(Conformance):
    method = ProTeGi
    settings: ClassVar = {"rounds": 1, "minibatch": 8, "gradients": 2, "paraphrases": 1, "successors": 4}


def by_number(texts: Sequence[str]) -> list[list[float]]:
    """Embed rows in two directions, so that both have rows of either label."""
    numbers = [int(found[0]) if (found := re.findall(r"\d+", text)) else 0 for text in texts]
    return [[1.0, 0.0] if number // 2 % 2 else [0.0, 1.0] for number in numbers]


class TestMixtureOfExperts(Conformance):
    method = MixtureOfExperts
    settings: ClassVar = {
        "method": APE,
        "settings": TestAPE.settings,
        "regions": 2,
        "least_rows": 2,
        "embedder": Embedder("by number", by_number),
    }
    confirm = 64  # so that a region's half of them can confirm its expert


class TestHillClimbing(Conformance):
    method = METHODS["hill_climbing"]
    settings: ClassVar = {"steps": 3}


SUITES: tuple[type[Conformance], ...] = (
    TestAPE,
    TestCOPRO,
    TestConstitutionalExperts,
    TestGEPA,
    TestInstructZero,
    TestMIPROv2,
    TestMixtureOfExperts,
    TestProTeGi,
    TestHillClimbing,
)


def test_every_installed_method_is_tested_here() -> None:
    assert set(METHODS.values()) <= {suite.method for suite in SUITES}


def compile_all(place: Path) -> dict[str, dict[str, bytes]]:
    for suite in SUITES:
        suite().compiled(suite().models(), place / suite.__name__)
    return {suite.__name__: toy.saved(place / suite.__name__) for suite in SUITES}


def test_programs_are_the_same_whatever_order_sets_have(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", ELSEWHERE, __file__, str(tmp_path / "elsewhere")]
    subprocess.run(command, check=True, env=environment)

    for name, files in compile_all(tmp_path / "here").items():
        assert toy.saved(tmp_path / "elsewhere" / name) == files, name


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"hill_climbing"}))
def test_our_methods_name_their_paper(name: str) -> None:
    assert METHODS[name].paper.startswith("arXiv:")
    assert METHODS[name].__module__.startswith("preceptor.teleprompters.")


def test_a_third_partys_method_is_listed_once_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(THIRD_PARTY)

    assert run(["methods", "--json"]) == 0

    listed = json.loads(capsys.readouterr().out)
    assert listed["hill_climbing"]["calls"] == "rows + steps * (1 + rows)"
    assert set(listed) == set(METHODS)
