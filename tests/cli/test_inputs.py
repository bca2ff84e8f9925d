"""A file of the user's as a program or a metric."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import run
from preceptor.cli.inputs import is_saved, metric_of, program_of, rows_of
from preceptor.errors import ConfigError, DataError

TICKETS = """
from __future__ import annotations
import dataclasses
import enum
import dspy
from shared_words import SEED

with open(__file__ + ".log", "a") as log:
    log.write("x")

class Queue(enum.Enum):
    TAX = "tax"
    REST = "rest"

@dataclasses.dataclass
class Rule:
    kind: dataclasses.InitVar[int] = 0

class Desk(dspy.Module):
    def __init__(self):
        super().__init__()
        fields = {"text": (str, dspy.InputField()), "queue": (Queue, dspy.OutputField())}
        self.predict = dspy.Predict(dspy.Signature(fields, SEED))

class Needy(Desk):
    def __init__(self, size):
        super().__init__()

class Empty(dspy.Module):
    def forward(self, text):
        return dspy.Prediction(queue="tax")

def judge(example, prediction):
    return prediction.queue is Queue.TAX

THRESHOLD = 0.5
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "tickets_of_mine.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_is_executed_once_and_may_import_its_neighbours(tmp_path: Path, written: Callable[[str], Path]) -> None:
    (tmp_path / "shared_words.py").write_text("SEED = 'Sort.'\n", encoding="utf-8")
    path = written(TICKETS)

    program: Any = program_of(f"{path}:Desk", None)
    metric = metric_of(f"{path}:judge", program_of(f"{path}:Desk", None))

    queue = program.predict.signature.output_fields["queue"].annotation
    assert metric.__globals__["Queue"] is queue
    assert program.predict.signature.instructions == "Sort."
    assert Path(f"{path}.log").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Needy",
            r"Needy, called without arguments, raised TypeError: .* missing 1 required positional argument: 'size'",
        ),
        ("Empty", r"Empty has no predictor, such as dspy\.Predict, whose instructions could be improved\.$"),
    ],
)
def test_what_is_no_program_to_improve_is_refused(
    tmp_path: Path, written: Callable[[str], Path], name: str, message: str
) -> None:
    (tmp_path / "shared_words.py").write_text("SEED = 'Sort.'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        program_of(f"{written(TICKETS)}:{name}", None)


@pytest.mark.parametrize("target", ["runs/spam/program", "Is this spam? " * 30])
def test_what_is_no_folder_no_signature_and_no_files_object_is_told_as_that(target: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^No folder '.*' of a saved program; a signature has '->', as in .*; other programs are FILE\.py:NAME",
    ):
        is_saved(target)


@pytest.mark.parametrize("target", ["text label", "text - > label", "runs/good/program", "mine.txt:Desk"])
def test_what_cant_be_compiled_is_told_with_what_can(target: str) -> None:
    with pytest.raises(ConfigError) as told:
        program_of(target, None)
    assert str(told.value) == (
        f"{target!r} is no program to be asked: a signature has '->', as in \"text -> label: Literal['a', 'b']\"; "
        "other programs are FILE.py:NAME. A saved one can't be compiled again."
    )


def test_a_folder_is_a_saved_program_and_a_signature_or_a_files_object_none(tmp_path: Path) -> None:
    assert is_saved(str(tmp_path))
    assert not is_saved(f"{tmp_path}/mine.py:Desk")
    assert not is_saved("text -> label: Literal['spam', 'mail']")


def test_a_number_is_no_metric(tmp_path: Path, written: Callable[[str], Path]) -> None:
    (tmp_path / "shared_words.py").write_text("SEED = 'Sort.'\n", encoding="utf-8")
    path = written(TICKETS)
    with pytest.raises(ConfigError, match=r"THRESHOLD is a float; a metric is a function of an example and a predict"):
        metric_of(f"{path}:THRESHOLD", program_of(f"{path}:Desk", None))


@pytest.mark.parametrize("code", ["import sys; sys.exit('no licence')", "raise SystemExit(0)", "1 / 0"])
def test_a_file_that_ends_the_process_is_a_wrong_use(
    written: Callable[[str], Path], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(code)
    assert run(["compile", f"{path}:Desk", "--data", "rows.csv"]) == 2
    assert "tickets_of_mine.py, imported, raised " in " ".join(capsys.readouterr().err.split())


def test_a_file_that_was_changed_is_read_again(written: Callable[[str], Path]) -> None:
    program = "import dspy\nProgram = dspy.Predict('text -> {}')\n"
    for name in ("a", "b"):
        found: Any = program_of(f"{written(program.format(name))}:Program", None)
        assert list(found.signature.output_fields) == [name]


def test_the_commands_dont_wait_for_what_only_some_need() -> None:
    """Torch alone takes seconds, which `show` and models behind a server have no use for."""
    command = """
import sys
from preceptor.cli import run
assert run(["models"]) == 0
print([name for name in ("torch", "transformers", "faiss", "cmaes") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("signature", "missing"), [("text -> ", "output"), (" -> label", "input")])
def test_a_signature_without_an_input_or_an_output_is_refused(signature: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f'has no {missing}. Write it as "text -> label: Literal'):
        program_of(signature, None)


def test_a_missing_column_is_told_beside_the_files_own_columns(tmp_path: Path) -> None:
    place = tmp_path / "rows.csv"
    place.write_text("Message Body,kind\nhi,spam\n", encoding="utf-8")
    program = program_of("text -> label: Literal['spam', 'mail']", None)
    with pytest.raises(DataError, match=r"has no column 'label'; it has kind, Message Body\."):
        rows_of(program, str(place), columns={"text": "Message Body"})
