"""Every installed method keeps to the promises of `preceptor.testing.conformance`; so does a third party's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar

import pytest

from preceptor.cli import run
from preceptor.teleprompters import APE, COPRO, GEPA, MIPROv2
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


class TestGEPA(Conformance):
    method = GEPA
    estimate_bound = 0.7  # it meets most of so few rows again, with the same instruction: nothing is asked then


class TestMIPROv2(Conformance):
    method = MIPROv2


class TestHillClimbing(Conformance):
    method = METHODS["hill_climbing"]
    settings: ClassVar = {"steps": 3}


SUITES: tuple[type[Conformance], ...] = (TestAPE, TestCOPRO, TestGEPA, TestMIPROv2, TestHillClimbing)


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
