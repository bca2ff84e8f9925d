"""`preceptor compile` and `resume`: what is checked before a model is there, and where a run is kept and goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import run
from preceptor.cli.command import Command, from_anywhere, model_from_anywhere
from preceptor.cli.compiling import _knobs
from preceptor.errors import ConfigError
from preceptor.lm.embedding import MODELS
from preceptor.run import read_run
from preceptor.scoring.metrics import BUILT_IN
from preceptor.teleprompters import ConstitutionalExperts
from preceptor.testing import ChatServer

SPAM = "text -> label: Literal['spam', 'mail']"


def written(path: Path, count: int = 24, word: str = "Lunch") -> Path:
    lines = [f"{'Win a prize' if n % 2 else word} {n},{'spam' if n % 2 else 'mail'}" for n in range(count)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return written(tmp_path / "rows.csv")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(lambda body: "spam") as server:
        yield server


def arguments(rows: Path, server: ChatServer, *more: str) -> list[str]:
    models = ["--lm", "openai/m", "--api-base", server.url]
    knobs = ["--set", "candidates=1", "--budget", "calls=120"]
    return ["compile", SPAM, "--instructions", "Sort.", "--data", str(rows), *models, *knobs, *more]


def compiled(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert run([*command, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_run_of_other_data_has_a_folder_of_its_own(
    rows: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compiled(capsys, *arguments(rows, server))
    written(rows, word="Dinner")
    second = compiled(capsys, *arguments(rows, server))
    assert first["run"] != second["run"]
    assert second["billed_calls"] == second["calls"]


def test_a_run_is_gone_on_with_by_other_settings_of_its_calls(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compiled(capsys, *arguments(rows, server))
    calls = ["--threads", "2", "--timeout", "300", "--retries", "1", "--price", "openai/m=1/1"]
    copied = tmp_path / "same.csv"
    copied.write_bytes(rows.read_bytes())
    with ChatServer(lambda body: "mail") as other:
        again = compiled(capsys, *arguments(copied, other, *calls))
        resumed = compiled(capsys, "resume", first["run"], "--timeout", "9", "--retries", "0", "--threads", "3")
        assert other.count == 0
    assert again["run"] == resumed["run"] == first["run"]
    assert (again["billed_calls"], resumed["billed_calls"], again["calls"]) == (0, 0, first["calls"])
    command = read_run(Path(first["run"]))["command"]
    assert (command["timeout"], command["retries"], command["threads"], command["data"]) == (9, 0, 3, str(rows))


def test_a_run_remembers_the_first_command_that_could_be_carried_out(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(arguments(rows, server, "--run", str(folder), "--metric", "wit")) == 2
    assert not folder.exists()
    assert run(arguments(rows, server, "--run", str(folder), "--lm", "local/gpt-9")) == 2
    assert run(arguments(rows, server, "--run", str(folder), "--budget", "calls=9")) == 2
    assert "command" not in read_run(folder)
    assert compiled(capsys, *arguments(rows, server, "--run", str(folder), "--threads", "5"))["calls"] == 37

    other = written(tmp_path / "other.csv", word="Dinner")
    assert run(arguments(other, server, "--run", str(folder), "--budget", "calls=130")) == 2
    assert "belongs to another trainset" in capsys.readouterr().err
    command = read_run(folder)["command"]
    assert (command["data"], command["budget"], command["threads"]) == (str(rows), "calls=120", 5)
    assert compiled(capsys, "resume", str(folder))["billed_calls"] == 0


def test_a_run_that_its_metric_ended_says_what_is_spent_and_goes_on_once_the_metric_is_mended(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text(
        "def right(example, prediction, trace=None):\n    return 1 / (prediction.label == example.label)\n"
    )
    folder = tmp_path / "run"
    assert run(arguments(rows, server, "--run", str(folder), "--metric", f"{metric}:right")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "The metric right raised ZeroDivisionError" in told
    spent = server.count
    assert f"Spent so far: {spent} calls" in told
    assert f"go on with: preceptor resume {folder}" in told

    metric.write_text("def right(example, prediction, trace=None):\n    return prediction.label == example.label\n")
    result = compiled(capsys, "resume", str(folder))
    assert result["calls"] - result["billed_calls"] == spent > 0


def test_a_missing_key_of_the_proposers_is_told_before_the_first_call(
    rows: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert run(arguments(rows, server, "--proposer", "anthropic/claude-3-5-haiku-20241022")) == 2
    assert "haiku-20241022 needs a key. Set ANTHROPIC_API_KEY in" in " ".join(capsys.readouterr().err.split())
    assert server.count == 0


def test_a_finished_run_is_made_again_without_a_key(
    rows: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compiled(capsys, *arguments(rows, server))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert compiled(capsys, "resume", first["run"])["billed_calls"] == 0


def test_a_run_of_another_version_is_refused(
    rows: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(compiled(capsys, *arguments(rows, server))["run"])
    known = read_run(folder)
    known["command"]["speed"] = 9
    (folder / "run.json").write_text(json.dumps(known), encoding="utf-8")
    assert run(["resume", str(folder)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "was started by another version of preceptor: " in message
    assert "unexpected keyword argument 'speed'. Compile again with --run" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "wit"], "No metric 'wit'; choose one of accuracy"),
        (["--threads", "0"], "APE needs threads >= 1, got 0."),
        (["--timeout", "0"], "Patience needs 0 < timeout <= 2147483"),
        (["--retries", "-1"], "retries >= 0"),
        (["--price", "free"], "--price 'free' is not name=value."),
        (["--price", "m=1/1"], "--price m=...: no such model is asked here; local/gpt-9 is."),
        (["--seed", "-1"], "APE needs seed >= 0, got -1."),
        (["--set", "candidates=many"], "APE: --set candidates=many must be a whole number."),
        (["--data", "FEW"], "Too few rows: 5 to search on, 5 to confirm on; at least 2 and 6"),
        (["--val", "rows.csv"], "valset: all 24 rows have the inputs of rows of the trainset"),
        (["--run", "/proc/preceptor"], "Can't write the run folder /proc/preceptor"),
    ],
)
def test_what_cant_work_is_refused_before_the_model_is_loaded(
    rows: Path, tmp_path: Path, server: ChatServer, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FEW": str(written(tmp_path / "few.csv", 10)), "rows.csv": str(rows)}
    asked = [places.get(each, each) for each in more]
    assert run(arguments(rows, server, "--lm", "local/gpt-9", *asked)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache" / "runs").exists()


def test_as_many_rows_as_are_asked_for_are_drawn_and_resumed_with(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compiled(capsys, *arguments(rows, server, "--rows", "18"))
    assert (first["train_rows"], first["rows"]) == (9, 9)
    assert compiled(capsys, "resume", first["run"])["billed_calls"] == 0

    other = written(tmp_path / "other.csv", 40, word="Dinner")
    other.write_text(other.read_text(encoding="utf-8").replace("prize", "car"), encoding="utf-8")
    both = compiled(capsys, *arguments(rows, server, "--val", str(other), "--rows", "20"))
    assert (both["train_rows"], both["rows"]) == (20, 20)
    assert both["run"] != first["run"]


def test_a_run_of_relative_paths_is_resumed_from_another_folder(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = """import dspy
class Sort(dspy.Signature):
    "Sort."
    text: str = dspy.InputField()
    label: str = dspy.OutputField()
def judge(example, prediction):
    return float(example.label == prediction.label)
"""
    (tmp_path / "task.py").write_text(task, encoding="utf-8")
    others = written(tmp_path / "others.csv", word="Dinner")
    others.write_text(others.read_text(encoding="utf-8").replace("prize", "car"), encoding="utf-8")
    (tmp_path / "other").mkdir()
    given = arguments(rows, server)[4:]
    monkeypatch.chdir(tmp_path)
    command = ["compile", "task.py:Sort", "--metric", "task.py:judge", "--val", "others.csv", *given]
    command[command.index(str(rows))] = "rows.csv"
    folder = compiled(capsys, *command)["run"]

    monkeypatch.chdir(tmp_path / "other")
    assert compiled(capsys, "resume", folder)["billed_calls"] == 0

    known = read_run(Path(folder))["command"]
    assert (known["target"], known["metric"]) == (f"{tmp_path}/task.py:Sort", f"{tmp_path}/task.py:judge")
    assert (known["data"], known["validation"]) == (str(rows), f"{tmp_path}/others.csv")


def test_a_run_by_an_embedder_in_a_folder_has_its_whole_path_and_a_place_of_its_own_when_it_is_trained_further(
    rows: Path,
    tmp_path: Path,
    server: ChatServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    save_encoder: Callable[[Path, Mapping[str, Sequence[float]]], Path],
) -> None:
    command = arguments(rows, server, "--mixture", "2", "--set", "embedder=encoder", "--dry-run")
    monkeypatch.chdir(tmp_path)
    places: list[str] = []
    for fox in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]):
        save_encoder(tmp_path / "encoder", {"fox": fox})
        places.append(compiled(capsys, *command)["run"])

    assert places[0] == places[1] != places[2]
    remembered = from_anywhere(Command(target="", data="", knobs={"embedder": "encoder", "candidates": "4"}))
    assert remembered.knobs == {"embedder": str(tmp_path / "encoder"), "candidates": "4"}
    assert server.count == 0


def test_a_model_in_a_folder_has_its_whole_path_and_others_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    (tmp_path / "models" / "tuned" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    whole = f"local/{tmp_path}/models/tuned"
    assert model_from_anywhere("local/models/tuned") == model_from_anywhere(whole) == whole
    assert model_from_anywhere("local/models/tuned@0123456789ab") == f"{whole}@0123456789ab"
    for name in ("local/smollm2-135m", "local/org/model", "openai/models/tuned"):
        assert model_from_anywhere(name) == name


def test_a_run_goes_on_in_dollars_at_a_price_that_is_given_then(
    rows: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compiled(capsys, *arguments(rows, server))["run"]
    assert run(["resume", folder, "--budget", "dollars=5"]) == 2
    assert "--price openai/m=0.5/1.5" in " ".join(capsys.readouterr().err.split())
    resumed = compiled(capsys, "resume", folder, "--budget", "dollars=5", "--price", "openai/m=1/1")
    assert (resumed["run"], resumed["billed_calls"]) == (folder, 0)
    assert read_run(Path(folder))["command"]["prices"] == ["openai/m=1/1"]


@pytest.mark.filterwarnings("ignore:Field name .* shadows an attribute in parent:UserWarning")
@pytest.mark.parametrize(
    ("signature", "field"),
    [("config -> label", "config"), ("text -> demos: list[str]", "demos"), ("text -> signature", "signature")],
)
def test_a_field_that_would_steer_the_call_is_refused_before_any_call(
    rows: Path, server: ChatServer, capsys: pytest.CaptureFixture[str], signature: str, field: str
) -> None:
    command = arguments(rows, server, "--dry-run")
    command[1] = signature
    assert run(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"has a field {field!r}, which DSPy takes for a setting of the call." in told
    assert f"--column NEW={field}" in told
    assert server.count == 0


def test_the_help_and_the_readme_name_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [told] = re.findall(r"- `--metric`: (.*?)\n- ", readme, re.DOTALL)
    assert run(["compile", "--help"]) == 0
    helped = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    for name in BUILT_IN:
        assert all(("f1:LABEL" if name == "f1" else name) in text for text in (told, helped))


def test_a_plan_for_the_folder_of_a_compile_is_told_of_that_compile_only(
    rows: Path, tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(rows, server, "--run", str(tmp_path / "run"))
    assert compiled(capsys, *command)["billed_calls"] > 0
    asked = server.count

    assert compiled(capsys, *command, "--dry-run")["run"] == str(tmp_path / "run")
    assert run([*command, "--dry-run", "--seed", "7"]) == 2
    assert "belongs to another method and trainset and valset" in " ".join(capsys.readouterr().err.split())
    assert server.count == asked


@pytest.mark.parametrize(("text", "value"), [("false", False), ("True", True)])
def test_a_setting_that_is_true_or_false_is_read_as_that(text: str, value: bool) -> None:
    assert _knobs(ConstitutionalExperts, {"join": text}) == {"join": value}
    with pytest.raises(ConfigError, match=r"^ConstitutionalExperts: --set join=no must be true or false\.$"):
        _knobs(ConstitutionalExperts, {"join": "no"})


def test_what_so_many_rows_can_confirm_is_said_before_any_call(
    rows: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any]) -> str:
        told.append(capsys.readouterr().err)
        return "spam"

    told: list[str] = []
    server.answer = answer
    assert run(arguments(rows, server, "--threads", "1")) == 0
    assert "12 rows confirm a gain of 76 points or more in a score of 0 or 1, four times in five" in " ".join(
        told[0].split()
    )


def test_an_embedder_of_the_catalogue_keeps_its_name_whatever_folder_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("all-minilm-l6-v2", "mine"):
        Path(name).mkdir()
        command = Command(target=SPAM, data="rows.csv", knobs={"embedder": name, "regions": "2"})
        whole = name if name in MODELS else str(tmp_path / name)
        assert from_anywhere(command).knobs == {"embedder": whole, "regions": "2"}
