"""`preceptor eval` on one program and on two; programs that follow a rule make the numbers known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor import program as artifact
from preceptor.cli import run
from preceptor.modules import Classify
from preceptor.run import locked
from preceptor.testing import ChatServer, Faults

LM = ["--lm", "local/smollm2-135m"]
SPAM = "text -> label: Literal['spam', 'mail']"
RULES = """
import dspy

from preceptor.testing import simulated

class Rule(dspy.Module):
    def __init__(self, signature="text -> label"):
        super().__init__()
        self.predict = dspy.Predict(signature)

class Mail(Rule):
    def forward(self, text):
        return dspy.Prediction(label="mail")

class Prize(Rule):
    def forward(self, text):
        return dspy.Prediction(label="spam" if "prize" in text else "mail")

class Topic(Rule):
    def __init__(self):
        super().__init__("text -> topic")
    def forward(self, text):
        return dspy.Prediction(topic="mail")

class Own(Rule):
    def __init__(self):
        super().__init__("text -> label")
        self.predict.lm = simulated(lambda request: "[[ ## label ## ]]\\nmail\\n\\n[[ ## completed ## ]]")
    def forward(self, text):
        return self.predict(text=text)

class Odd(Rule):
    def forward(self, text):
        if text.endswith("0"):
            raise RuntimeError("the line is dead")
        return dspy.Prediction(label="mail")

print("imported")

class Talks(Rule):
    def forward(self, text):
        print("asked", text)
        return dspy.Prediction(label="mail")

def told(example, prediction):
    print("judged", prediction.label)
    return example.label == prediction.label

def graded(example, prediction):
    return 0.75 if example.label == prediction.label else 0.25
"""


@pytest.fixture
def here(tmp_path: Path, smollm: dspy.LM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 40 rows, 15 of them spam; the word prize gives 12 of those away and one piece of mail too."""
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    texts = [("win a prize", "spam")] * 12 + [("cheap pills", "spam")] * 3 + [("prize giving", "mail")] * 1
    texts += [("lunch at noon", "mail")] * 24
    lines = [f"{text} {number},{label}" for number, (text, label) in enumerate(texts, 1)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    return tmp_path


def arguments(here: Path, *names: str) -> list[str]:
    return ["eval", *(f"{here}/rules.py:{name}" for name in names), "--data", str(here / "rows.csv"), *LM]


def evaluated(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert run([*command, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_one_program_has_its_score_interval_and_confusion(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, *arguments(here, "Prize"))

    assert (result["metric"], result["rows"], result["score"]) == ("exact_match", 40, 0.9)
    assert result["ci"] == [pytest.approx(0.7695, abs=1e-4), pytest.approx(0.9604, abs=1e-4)]  # Wilson, 36 of 40
    assert {(cell["label"], cell["answer"]): cell["rows"] for cell in result["confusion"]} == {
        ("spam", "spam"): 12,
        ("spam", "mail"): 3,
        ("mail", "spam"): 1,
        ("mail", "mail"): 24,
    }


def test_what_a_program_and_a_metric_print_is_not_among_the_results(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments(here, "Talks"), "--metric", f"{here}/rules.py:told", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["score"] == 0.625
    assert {"asked win a prize 1", "judged mail"} <= set(told.err.splitlines())


def test_the_model_of_a_programs_own_is_metered_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(here, "Own"), "--budget", "calls=39"]) == 3
    assert "with a larger budget goes on" in " ".join(capsys.readouterr().err.split())
    assert evaluated(capsys, *arguments(here, "Own"), "--budget", "calls=40")["score"] == 0.625


def test_two_programs_are_compared_row_by_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, *arguments(here, "Mail", "Prize"))

    assert (result["first"]["score"], result["second"]["score"]) == (0.625, 0.9)
    assert result["gain"] == pytest.approx(0.275)
    assert result["changes"] == {"both right": 24, "both wrong": 3, "wrong -> right": 12, "right -> wrong": 1}
    assert (result["test"], result["rows"], result["better"]) == ("exact McNemar", 40, "second")
    assert result["p_value"] == pytest.approx(2 * (13 + 1) / 2**13)
    assert 0 < result["ci"][0] < 0.275 < result["ci"][1]
    assert result["smallest_gain"] == pytest.approx(0.327, abs=1e-3)
    assert result["examples"] == []


def test_turned_round_the_first_is_better(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, *arguments(here, "Prize", "Mail"))
    assert (result["better"], result["changes"]["right -> wrong"]) == ("first", 12)
    assert result["ci"][1] < 0


def test_a_program_is_no_better_than_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, *arguments(here, "Mail", "Mail"))
    assert (result["gain"], result["p_value"], result["better"]) == (0.0, 1.0, None)


def test_rows_that_changed_are_listed_each_way(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, *arguments(here, "Mail", "Prize"), "--changes", "2")
    assert [(each["row"], each["change"], each["first"], each["second"]) for each in result["examples"]] == [
        (1, "wrong -> right", "mail", "spam"),
        (2, "wrong -> right", "mail", "spam"),
        (16, "right -> wrong", "mail", "spam"),
    ]
    assert result["examples"][0]["inputs"] == {"text": "win a prize 1"}


def test_the_comparison_is_printed_for_people(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(here, "Mail", "Prize"), "--changes", "1"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    assert lines[0].split()[-1] == "model"
    assert lines[1].startswith("first         0.625  0.470 to 0.758")
    assert lines[3:7] == [
        "",
        "gain +27.5 points, 95 % interval +11.7 to +43.7, p = 0.0034 (exact McNemar, 40 rows)",
        "The second program is better.",
        "Four times in five, so many rows confirm a true gain of 33 points.",
    ]
    assert "wrong -> right     12" in lines
    assert lines[-2:] == [
        "row 16, right -> wrong: text: prize giving 16",
        "  label mail, first mail, second spam",
    ]


def test_other_scores_are_higher_lower_or_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(here, "Mail", "Prize"), "--metric", f"{here}/rules.py:graded"]
    result = evaluated(capsys, *command)
    assert result["changes"] == {"same score": 27, "higher": 12, "lower": 1}
    assert (result["test"], result["better"]) == ("permutation", "second")
    assert result["gain"] == pytest.approx(11 * 0.5 / 40)


def test_a_row_that_one_program_fails_with_counts_against_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"lunch {n},mail" for n in range(11, 31)) + "\n", encoding="utf-8"
    )
    assert run(arguments(here, "Mail", "Odd")) == 4  # 2 of 20 rows are too many
    assert "2 of 20 rows failed" in capsys.readouterr().err
    (here / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"lunch {n},mail" for n in range(11, 40 - 1) if n != 30) + "\n", encoding="utf-8"
    )
    result = evaluated(capsys, *arguments(here, "Mail", "Odd"))
    assert (result["rows"], result["second"]["failed"], result["gain"]) == (27, 1, pytest.approx(-1 / 27))
    assert result["changes"] == {
        "both right": 26,
        "both wrong": 0,
        "wrong -> right": 0,
        "right -> wrong": 0,
        "failed": 1,
    }


def test_the_first_row_that_failed_is_told_with_its_reason(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"lunch {n},mail" for n in range(28, 50) if n != 40) + "\n", encoding="utf-8"
    )
    failures = evaluated(capsys, *arguments(here, "Odd"))["failures"]
    assert [(failure["row"], failure["reason"][:34]) for failure in failures] == [
        (3, "RuntimeError: the line is dead (ru")
    ]
    assert run(arguments(here, "Odd")) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "unparsable answers: 0, failed calls: 1, left out of the score",
        f"row 3 failed: {failures[0]['reason']}",
    ]
    assert run(arguments(here, "Mail", "Odd")) == 0
    told = capsys.readouterr().out
    assert f"\nrow 3 failed with the second program: {failures[0]['reason']}\n" in told
    assert "with the first program" not in told


def test_programs_of_different_outputs_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.csv").write_text("text,label,topic\nlunch,mail,mail\n", encoding="utf-8")
    assert run(arguments(here, "Mail", "Topic")) == 2
    assert "The first program answers 'label' and the second 'topic'" in capsys.readouterr().err.replace("\n", " ")


def test_equal_calls_of_two_signatures_are_made_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--instructions", "Is it spam?", "--instructions", "Is it spam?"]
    result = evaluated(capsys, "eval", SPAM, SPAM, "--data", str(here / "rows.csv"), *LM, *prompts)
    assert result["billed_calls"] == 40
    assert (result["gain"], result["first"]["rows"], result["second"]["rows"]) == (0.0, 40, 40)


def test_each_signature_has_its_own_instructions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", SPAM, SPAM, "--data", str(here / "rows.csv"), *LM]
    assert evaluated(capsys, *command, "--instructions", "Is it spam?")["billed_calls"] == 80  # the other has DSPy's
    assert run([*command, *(["--instructions", "Hm."] * 3)]) == 2
    assert "3 times --instructions for 2 signatures; give one for each." in capsys.readouterr().err.replace("\n", " ")


def test_a_saved_program_is_compared_with_a_signature_on_its_own_model(
    here: Path, capsys: pytest.CaptureFixture[str], smollm: dspy.LM
) -> None:
    artifact.save(Classify(SPAM, "Is it spam?"), here / "saved", evidence={}, lm=smollm.model)
    result = evaluated(
        capsys, "eval", SPAM, str(here / "saved"), "--data", str(here / "rows.csv"), "--instructions", "Is it spam?"
    )
    assert result["first"]["lm"] == result["second"]["lm"] == smollm.model
    assert (result["gain"], result["billed_calls"]) == (0.0, 40)
    assert [result[side]["program"] for side in ("first", "second")] == [SPAM, str(here / "saved")]


@pytest.mark.parametrize(
    ("evidence", "asked", "metric"),
    [
        ({"metric": "f1:spam"}, [], "f1:spam"),
        ({"metric": "f1:spam"}, ["--metric", "accuracy"], "accuracy"),
        ({"metric": "judge"}, [], "accuracy"),
        ({"metric": "judge"}, ["--metric", "macro_f1"], "macro_f1"),
        ({"metric": "f1", "own_metric": True}, [], "accuracy"),
    ],
)
def test_a_program_is_scored_by_the_metric_of_its_compile(
    here: Path, capsys: pytest.CaptureFixture[str], evidence: dict[str, Any], asked: list[str], metric: str
) -> None:
    artifact.save(Classify(SPAM, "Is it spam?"), here / "saved", evidence=evidence, lm="openai/m")
    with ChatServer(lambda body: "spam") as server:
        given = ["eval", str(here / "saved"), "--data", str(here / "rows.csv"), "--api-base", server.url, *asked]
        assert run([*given, "--json"]) == 0
    told = capsys.readouterr()

    assert json.loads(told.out)["metric"] == metric
    is_own = f"give --metric FILE.py:{evidence['metric']}" in " ".join(told.err.split())
    assert is_own == (evidence["metric"] in ("judge", "f1") and not asked)


@pytest.mark.parametrize(("least", "code"), [("0.375", 0), ("0.376", 1)])
def test_a_score_below_the_one_asked_for_is_an_exit_code(
    here: Path, capsys: pytest.CaptureFixture[str], least: str, code: int
) -> None:
    with ChatServer(lambda body: "spam") as server:  # right on 15 rows of 40
        assert run([*hosted(here, server), "--fail-under", least, "--json"]) == code
        told = capsys.readouterr()
        assert json.loads(told.out)["score"] == 0.375
        assert ("scores 0.375, which is below 0.376." in told.err) == (code == 1)

        both = ["--instructions", "Sort.", "--instructions", "Is it spam?", "--fail-under", least]
        command = hosted(here, server, *both)
        assert run([command[0], SPAM, *command[1:], "--json"]) == code


def hosted(here: Path, server: ChatServer, *more: str) -> list[str]:
    return ["eval", SPAM, "--data", str(here / "rows.csv"), "--lm", "openai/m", "--api-base", server.url, *more]


def test_an_eval_goes_on_with_the_answers_it_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda body: "spam") as server:
        assert run(hosted(here, server, "--budget", "calls=30")) == 3
        assert "the same command with a larger budget goes on." in " ".join(capsys.readouterr().err.split())
        assert server.count <= 30

        assert evaluated(capsys, *hosted(here, server, "--budget", "calls=40"))["score"] == 15 / 40
        assert server.count == 40
        assert run([*hosted(here, server), "--json"]) == 0
        again = capsys.readouterr()
        assert (json.loads(again.out)["score"], server.count) == (15 / 40, 40)
        assert "40 answers are of an earlier eval, kept in " in " ".join(again.err.split())
        with ChatServer(lambda body: "mail") as other:
            assert evaluated(capsys, *hosted(here, other))["score"] == 25 / 40

        told = evaluated(capsys, *hosted(here, server, "--instructions", "Is it spam?"))
        assert (told["rows"], server.count) == (40, 80)  # other requests have other answers


def test_a_second_eval_of_the_same_rows_at_once_is_told_how_to_get_a_folder_of_its_own(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", f"{here}/rules.py:Mail", "--data", str(here / "rows.csv"), *LM]
    assert run(command) == 0
    [folder] = (here / "cache" / "evals").iterdir()
    with locked(folder):
        assert run(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "Another process is using the run folder" in told
    assert "PRECEPTOR_CACHE names another cache." in told


def test_an_eval_whose_model_failed_goes_on_with_the_answers_it_has(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(lambda body: "spam", faults=Faults(kinds=("server_error",), share=0.3)) as server:
        assert run(hosted(here, server, "--retries", "0", "--threads", "1")) == 4
        assert "Every answer is kept; the same command goes on." in " ".join(capsys.readouterr().err.split())
        answered = server.answered
        server.inject(None)
        evaluated(capsys, *hosted(here, server))
        assert (server.answered, answered > 0) == (40, True)


def test_a_missing_key_is_told_before_anything_is_written_and_an_eval_made_again_needs_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(lambda body: "spam") as server:
        with monkeypatch.context() as without:
            without.delenv("OPENAI_API_KEY")
            assert run(hosted(here, server)) == 2
            assert "openai/m needs a key. Set OPENAI_API_KEY" in " ".join(capsys.readouterr().err.split())
            assert (server.count, (here / "cache").exists()) == (0, False)
        first = evaluated(capsys, *hosted(here, server))
        monkeypatch.delenv("OPENAI_API_KEY")
        assert evaluated(capsys, *hosted(here, server)) == first
        assert server.count == 40


def test_an_eval_tries_its_metric_and_its_settings_before_any_call(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text("def judge(example, prediction):\n    return prediction.lable\n", encoding="utf-8")
    with ChatServer(lambda body: "spam") as server:
        for more, message in (
            (["--metric", f"{here}/mine.py:judge"], "Tried on the first row of"),
            (["--timeout", "0"], "Patience needs 0 < timeout <= 2147483"),
            (["--budget", "dollars=1"], "openai/m"),
        ):
            assert run(hosted(here, server, *more)) == 2
            assert message in " ".join(capsys.readouterr().err.split())
        assert server.count == 0
        evaluated(capsys, *hosted(here, server, "--budget", "dollars=1", "--price", "openai/m=1/1"))
        assert server.count == 40
