"""A batch, its models simulated: what is asked, what is written, and what is asked again."""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pandas as pd
import pydantic
import pytest
from dspy.lm15 import Request

import preceptor
from preceptor import program as artifact
from preceptor.batch import Batch, Progress, open_source, refuse_failures
from preceptor.errors import BudgetExhausted, ConfigError, DataError, InputTooLong, LMFailed, RunError
from preceptor.lm.adapter import declare
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.modules import Classify, Experts, Generate
from preceptor.regions import Router
from preceptor.testing import asked, prompt, simulated

SPAM = "text -> label: Literal['spam', 'mail']"
HASTY = Patience(retries=0)


def judged(request: Request) -> str:
    return "spam" if "prize" in prompt(request) else "mail"


def texts(count: int) -> list[str]:
    return [f"{'a prize' if number % 2 else 'lunch'} {number}" for number in range(count)]


def table(path: Path, rows: list[str], **columns: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *columns])
        writer.writerows(zip(rows, *columns.values(), strict=True))
    return path


def read(folder: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("part-*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def failures(out: Path) -> list[dict[str, Any]]:
    lines = (out.with_name(f"{out.name}.batch") / "failed.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shards(out: Path) -> list[dict[str, Any]]:
    manifest = json.loads((out.with_name(f"{out.name}.batch") / "manifest.json").read_text(encoding="utf-8"))
    return list(manifest["shards"])


def batch(source: Path, out: Path, lm: dspy.LM | None = None, **settings: Any) -> Batch:
    given: dict[str, Any] = {"program": Classify(SPAM, "Sort."), "inputs": {"text": str}, "identity": "test"}
    given |= {"lm": lm or simulated(judged), "source": open_source(str(source)), "out": out, "shard_rows": 10}
    given |= {"patience": HASTY, **settings}
    return Batch(**given)


def failing(when: Callable[[str], bool], error: Exception | None = None) -> Callable[[Request], str]:
    def answer(request: Request) -> str:
        if when(prompt(request)):
            raise error or dspy.lm15.InvalidRequestError("no such luck")
        return judged(request)

    return answer


def test_every_row_is_answered_in_order_and_in_shards(tmp_path: Path) -> None:
    lm = simulated(judged)
    result = batch(table(tmp_path / "in.csv", texts(25)), tmp_path / "out", lm).run()

    assert read(tmp_path / "out") == [
        {"text": text, "label": "spam" if "prize" in text else "mail"} for text in texts(25)
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "part-00000.csv",
        "part-00001.csv",
        "part-00002.csv",
    ]
    assert {name: result[name] for name in ("rows", "answered", "failed", "shards", "calls", "billed_calls")} == {
        **{"rows": 25, "answered": 25, "failed": 0, "shards": 3, "calls": 25, "billed_calls": 25},
    }
    assert (result["columns"], result["failed_rows"]) == (["label"], None)
    assert len(asked(lm)) == 25
    manifest = json.loads((tmp_path / "out.batch" / "manifest.json").read_text())
    assert [(shard["file"], shard["answered"]) for shard in manifest["shards"]] == [
        ("part-00000.csv", 10),
        ("part-00001.csv", 10),
        ("part-00002.csv", 5),
    ]
    assert manifest["is_whole"] is True


def test_the_same_again_asks_nothing_and_equal_rows_are_asked_once(tmp_path: Path) -> None:
    source, lm = table(tmp_path / "in.csv", ["a prize"] * 15), simulated(judged)
    first = batch(source, tmp_path / "out", lm).run()
    again = batch(source, tmp_path / "out", lm).run()

    assert len(asked(lm)) == 1
    assert (first["calls"], first["billed_calls"]) == (1, 1)
    assert (again["calls"], again["billed_calls"], again["answered"]) == (1, 0, 15)
    assert again["tokens"] == first["tokens"] == 1 + 7 + 3 + 1  # prompt, the labels' sentence, the row, the answer


def test_a_file_is_joined_from_the_shards(tmp_path: Path) -> None:
    batch(table(tmp_path / "in.csv", texts(25)), tmp_path / "out.csv").run()
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts(25)
    with pytest.raises(ConfigError, match=r"The rows are CSV, and so is the output"):
        batch(tmp_path / "in.csv", tmp_path / "out.parquet").run()


def test_a_folder_of_parquet_shards_is_read_by_pandas_as_it_is(tmp_path: Path) -> None:
    pd.DataFrame({"text": texts(25), "n": range(25)}).to_parquet(tmp_path / "in.parquet")
    batch(tmp_path / "in.parquet", tmp_path / "out").run()
    frame = pd.read_parquet(tmp_path / "out")
    assert list(frame.columns) == ["text", "n", "label"]
    assert list(frame["n"]) == list(range(25))
    assert list(frame["label"])[:2] == ["mail", "spam"]


def test_a_column_of_the_answer_s_name_is_kept_and_the_answer_goes_beside_it(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", texts(2), label=["x", "y"])
    assert batch(source, tmp_path / "out").run()["columns"] == ["predicted_label"]
    assert [(row["label"], row["predicted_label"]) for row in read(tmp_path / "out")] == [("x", "mail"), ("y", "spam")]

    twice = table(tmp_path / "twice.csv", texts(2), label=["x", "y"], predicted_label=["x", "y"])
    with pytest.raises(ConfigError, match=r"has columns 'label' and 'predicted_label' already; rename one"):
        batch(twice, tmp_path / "other")


def test_failed_rows_go_into_a_file_with_the_reason_and_the_others_are_written(tmp_path: Path) -> None:
    lm = simulated(failing(lambda text: text.endswith(" 3")))
    source = table(tmp_path / "in.csv", [*texts(39), ""])
    result = batch(source, tmp_path / "out", lm, shard_rows=20).run()

    assert [result[name] for name in ("rows", "answered", "failed", "unusable")] == [40, 38, 1, 1]
    assert [(shard["failed"], shard["unusable"]) for shard in shards(tmp_path / "out")] == [(1, 0), (0, 1)]
    assert [row["text"] for row in read(tmp_path / "out")] == [text for n, text in enumerate(texts(39)) if n != 3]
    call, empty = failures(tmp_path / "out")
    assert (call["row"], call["kind"], call["values"]) == (4, "failed", {"text": "a prize 3"})
    assert "no such luck" in call["reason"]
    assert (empty["row"], empty["kind"]) == (40, "input")
    assert empty["reason"].endswith("in.csv, row 40, text: the value is missing.")


def test_failed_rows_are_asked_again_on_request_only_and_take_their_place(tmp_path: Path) -> None:
    broken = {"a prize 3", "lunch 8", "lunch 22"}
    lm = simulated(failing(lambda text: text.removeprefix("text: ") in broken))
    source = table(tmp_path / "in.csv", texts(60))
    assert batch(source, tmp_path / "out", lm).run()["failed"] == 3
    before = len(asked(lm))
    broken.remove("a prize 3")
    broken.remove("lunch 8")

    assert batch(source, tmp_path / "out", lm).run()["failed"] == 3
    assert len(asked(lm)) == before
    result = batch(source, tmp_path / "out", lm).run(retry_failed=True)
    again = sorted(prompt(request) for request in asked(lm)[before:])  # threads may ask in any order
    assert again == ["text: a prize 3", "text: lunch 22", "text: lunch 8"]
    assert (result["answered"], result["failed"], result["billed_calls"]) == (59, 1, 2)
    assert [row["text"] for row in read(tmp_path / "out")] == [text for n, text in enumerate(texts(60)) if n != 22]
    broken.clear()
    assert batch(source, tmp_path / "out", lm).run(retry_failed=True)["failed_rows"] is None
    assert not (tmp_path / "out.batch" / "failed.jsonl").exists()
    assert [row["text"] for row in read(tmp_path / "out")] == texts(60)


def test_an_answer_that_cannot_be_read_is_drawn_again_each_time_it_is_asked_for(tmp_path: Path) -> None:
    lines = iter(["perhaps", "who knows", "spam"])
    lm = simulated(lambda request: next(lines) if "prize 5" in prompt(request) else judged(request))
    source = table(tmp_path / "in.csv", texts(30))
    run = batch(source, tmp_path / "out", lm).run

    assert run()["failed"] == 1
    [row] = failures(tmp_path / "out")
    assert (row["row"], row["kind"]) == (6, "unparsable")
    assert "The reply is none of spam, mail." in row["reason"]
    assert run(retry_failed=True)["failed"] == 1
    result = run(retry_failed=True)
    assert (result["failed"], result["billed_calls"], len(asked(lm))) == (0, 1, 32)
    assert read(tmp_path / "out")[5] == {"text": "a prize 5", "label": "spam"}


def test_a_prompt_too_long_for_the_model_fails_its_row_only(tmp_path: Path) -> None:
    lm = simulated(failing(lambda text: "lunch 4" in text, InputTooLong("too long")))
    assert batch(table(tmp_path / "in.csv", texts(30)), tmp_path / "out", lm).run()["failed"] == 1
    assert failures(tmp_path / "out")[0]["reason"] == "InputTooLong: too long"


@pytest.mark.parametrize("error", [InputTooLong("too long"), dspy.lm15.InvalidRequestError("its content is filtered")])
def test_rows_that_fail_by_themselves_dont_count_as_a_broken_model_however_many_there_are(
    tmp_path: Path, error: Exception
) -> None:
    lm = simulated(failing(lambda text: "lunch" in text, error))
    source = table(tmp_path / "in.csv", ["a prize", *[f"lunch {number}" for number in range(60)], "a prize again"])
    result = batch(source, tmp_path / "out", lm, threads=1).run()
    assert (result["answered"], result["failed"], len(failures(tmp_path / "out"))) == (2, 60, 60)


def test_a_model_that_refuses_every_request_from_the_first_on_ends_the_batch(tmp_path: Path) -> None:
    lm = simulated(failing(lambda text: True))
    with pytest.raises(LMFailed, match="50 rows one after the other failed, the last with: LMInvalidRequestError"):
        batch(table(tmp_path / "in.csv", texts(60)), tmp_path / "out", lm, threads=1).run()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="No second file system here.")
def test_an_output_on_another_file_system_is_refused_before_a_call(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("It is the same one.")
        (tmp_path / "out").symlink_to(other)
        lm = simulated(judged)
        with pytest.raises(ConfigError, match=r"out can't take what is written beside it, .*of the same file system"):
            batch(table(tmp_path / "in.csv", texts(3)), tmp_path / "out", lm).run()
        assert (asked(lm), list(Path(other).iterdir())) == ([], [])


def test_a_model_that_fails_row_after_row_ends_the_batch_and_those_rows_are_asked_again(tmp_path: Path) -> None:
    is_down = [False]
    lm = simulated(failing(lambda text: is_down[0], dspy.lm15.ServerError("down")))
    source = table(tmp_path / "in.csv", texts(200))
    first = batch(source, tmp_path / "out", lm, shard_rows=100, threads=1)

    def goes_down(progress: Progress) -> None:
        is_down[0] = progress.rows >= 120

    with pytest.raises(LMFailed, match="50 rows one after the other failed, the last with"):
        replace(first, report=goes_down).run()
    assert len(read(tmp_path / "out")) == 100
    is_down[0] = False
    result = first.run()
    assert (result["answered"], result["failed"], result["billed_calls"]) == (200, 0, 80)


def test_rows_that_cannot_be_asked_are_passed_over_where_failures_in_a_row_are_counted(tmp_path: Path) -> None:
    lm = simulated(failing(lambda text: True))
    source = table(tmp_path / "in.csv", [text for number in range(60) for text in (f"lunch {number}", "")])

    with pytest.raises(LMFailed, match="50 rows one after the other failed"):
        batch(source, tmp_path / "out", lm, threads=1).run()

    assert len(asked(lm)) == 50


def test_more_failures_than_a_comparison_would_stand_end_with_an_error_once_all_is_written(tmp_path: Path) -> None:
    lm = simulated(failing(lambda text: int(text.split()[-1]) < 2))
    source = table(tmp_path / "in.csv", texts(20))
    result = batch(source, tmp_path / "out", lm).run()
    with pytest.raises(LMFailed, match=r"2 of 20 rows that were asked have no answer; .*failed.jsonl says why"):
        refuse_failures(result)
    assert len(read(tmp_path / "out")) == 18


def test_rows_that_cannot_be_asked_are_no_failures_of_the_model_and_are_never_asked_again(tmp_path: Path) -> None:
    lm = simulated(judged)
    source = table(tmp_path / "in.csv", [*texts(12), *[""] * 8])
    for retries in (False, True):
        result = batch(source, tmp_path / "out", lm).run(retry_failed=retries)
        refuse_failures(result)
        assert [result[name] for name in ("rows", "answered", "failed", "unusable", "shards")] == [20, 12, 0, 8, 2]
        assert [shard["retries"] for shard in shards(tmp_path / "out")] == [0, 0]
    assert [row["row"] for row in failures(tmp_path / "out")] == list(range(13, 21))

    nothing = batch(table(tmp_path / "empty.csv", [""] * 3, n=["1", "2", "3"]), tmp_path / "none", lm).run()
    with pytest.raises(DataError, match=r"None of the 3 rows can be used; .*failed.jsonl says why"):
        refuse_failures(nothing)


def test_the_budget_bounds_all_processes_together_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    lm = simulated(judged)
    source = table(tmp_path / "in.csv", texts(25))
    small, large = (batch(source, tmp_path / "out", lm, budget=Budget(calls=calls)) for calls in (14, 25))
    for _ in range(2):
        with pytest.raises(BudgetExhausted):
            small.run()
        assert len(asked(lm)) == 14
    assert json.loads((tmp_path / "out.batch" / "manifest.json").read_text())["is_whole"] is False
    assert len(read(tmp_path / "out")) == 10
    assert large.run()["billed_calls"] == 11
    assert [row["text"] for row in read(tmp_path / "out")] == texts(25)


class Careful(dspy.Module):
    """Says `mail` where it can't ask."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = Classify(SPAM, "Sort.")

    def forward(self, text: str) -> Any:
        try:
            return self.sort(text=text)
        except Exception:  # noqa: BLE001  as programs do
            return dspy.Prediction(label="mail")


@pytest.mark.parametrize("threads", [1, 8])
def test_what_a_program_answers_once_the_budget_has_ended_is_not_written(threads: int, tmp_path: Path) -> None:
    source, prizes = table(tmp_path / "in.csv", [f"a prize {number}" for number in range(40)]), ["spam"] * 40
    short = batch(source, tmp_path / "out", program=Careful(), budget=Budget(calls=15), threads=threads)

    with pytest.raises(BudgetExhausted, match=r"past the budget of 15"):
        short.run()
    assert [row["label"] for row in read(tmp_path / "out")] == prizes[:10]

    result = batch(source, tmp_path / "out", program=Careful(), budget=Budget(calls=40), threads=threads).run()
    assert [row["label"] for row in read(tmp_path / "out")] == prizes
    assert (result["calls"], result["failed"]) == (40, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"program": Classify(SPAM, "Sort well.")}, "program"),
        ({"identity": "another file"}, "program"),
        ({"lm": simulated(judged, name="other")}, "model"),
        ({"shard_rows": 5}, "number of rows a shard"),
        ({}, "input"),
    ],
)
def test_what_was_begun_with_other_parts_is_refused_and_stays(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = table(tmp_path / "in.csv", texts(12))
    batch(source, tmp_path / "out").run()
    other = replace(batch(source, tmp_path / "out"), **change)
    if not change:
        other = batch(table(tmp_path / "other.csv", texts(13)), tmp_path / "out")
    with pytest.raises(RunError, match=f"belongs to another {told}; nothing was overwritten"):
        other.run()
    assert len(read(tmp_path / "out")) == 12


def test_what_was_begun_under_another_adapter_is_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", texts(12))
    batch(source, tmp_path / "out").run()
    other = batch(source, tmp_path / "out")
    with dspy.context(adapter=dspy.JSONAdapter()), pytest.raises(RunError, match="belongs to another program"):
        other.run()


def with_model(lm: dspy.LM) -> dspy.Module:
    program = Classify(SPAM, "Sort.")
    program.set_lm(lm)
    return program


def test_what_was_begun_with_another_model_of_a_predictors_own_is_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", texts(12))
    one, other = (with_model(simulated(judged, name=name)) for name in ("one", "other"))
    batch(source, tmp_path / "out", program=one).run()
    with pytest.raises(RunError, match="belongs to another program; nothing was overwritten"):
        batch(source, tmp_path / "out", program=other).run()
    assert batch(source, tmp_path / "out", program=one).run()["billed_calls"] == 0


def test_a_budget_of_dollars_needs_a_price_of_every_model_and_one_of_tokens_a_bound(tmp_path: Path) -> None:
    source, engine = table(tmp_path / "in.csv", texts(12)), simulated(judged).engine
    unpriced = with_model(dspy.LM("openai/nobody-knows-this", max_tokens=5, cache=False))
    with pytest.raises(ConfigError, match="No price is known for openai/nobody-knows-this"):
        batch(source, tmp_path / "out", program=unpriced, budget=Budget(dollars=1)).run()
    unbounded = with_model(dspy.LM("simulated/own", engine=engine, cache=False))
    with pytest.raises(ConfigError, match=r"needs a bound per call: dspy\.LM\('simulated/own', max_tokens=512\)"):
        batch(source, tmp_path / "other", program=unbounded, budget=Budget(tokens=10_000)).run()


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", texts(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "out", source):
        with pytest.raises(RunError, match="is there already, and from no batch; nothing was overwritten"):
            batch(source, out).run()


def test_a_shard_that_was_lost_or_a_line_that_was_torn_is_made_good_from_the_ledger(tmp_path: Path) -> None:
    lm = simulated(judged)
    source = table(tmp_path / "in.csv", texts(40))
    batch(source, tmp_path / "out", lm).run()
    (tmp_path / "out" / "part-00001.csv").unlink()
    log = tmp_path / "out.batch" / "shards.jsonl"
    log.write_bytes(log.read_bytes()[:-20])

    result = batch(source, tmp_path / "out", lm).run()
    assert (result["billed_calls"], result["calls"], len(asked(lm))) == (0, 40, 40)
    assert [row["text"] for row in read(tmp_path / "out")] == texts(40)
    assert len([json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]) == 5


def test_progress_counts_rows_failures_and_what_was_paid(tmp_path: Path) -> None:
    seen: list[Progress] = []
    lm = simulated(failing(lambda text: text.endswith(" 3")))
    prices = {"simulated/model": (1.0, 2.0)}
    source = table(tmp_path / "in.csv", texts(21))
    settings: dict[str, Any] = {"budget": Budget(prices=prices), "report": seen.append, "threads": 1}
    batch(source, tmp_path / "out", lm, **settings).run()

    assert [progress.rows for progress in seen] == list(range(1, 22))
    assert (seen[-1].failed, seen[-1].about, seen[-1].fresh) == (1, 21, 21)
    words = sum(1 + 7 + len(f"text: {text}".split()) for text in texts(21) if text != "a prize 3")
    assert seen[-1].paid.dollars == pytest.approx((words * 1.0 + 20 * 2.0) / 1e6)


class Two(dspy.Module):
    """Answers with a field no predictor has, or with nothing that is a prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(declare("text -> label", "Sort."))

    def forward(self, text: str) -> Any:
        if text == "plain":
            return "plain"
        answer = {"topic": text[0], "label": self.predict(text=text).label}
        return dspy.Prediction(**answer, **({"odd": 1} if text == "odd" else {}))


def test_a_program_of_the_user_s_own_answers_with_the_fields_of_its_first_row(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", ["alpha", *["beta"] * 50, "plain", "odd"])
    lm = simulated(lambda request: "[[ ## label ## ]]\nx\n\n[[ ## completed ## ]]")
    result = batch(source, tmp_path / "out", lm, program=Two()).run()
    assert result["columns"] == ["topic", "label"]
    assert read(tmp_path / "out")[0] == {"text": "alpha", "topic": "a", "label": "x"}
    assert [row["reason"] for row in failures(tmp_path / "out")] == [
        "the program returned a str, not a dspy.Prediction",
        "the program answered with another field, 'odd', than in other rows",
    ]


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_a_program_that_picks_the_best_of_several_answers_answers_every_row(kind: Any, tmp_path: Path) -> None:
    program = kind(Classify(SPAM, "Sort."), N=2, reward_fn=lambda given, answer: 1.0, threshold=1.0)
    source = table(tmp_path / "in.csv", texts(2))

    result = batch(source, tmp_path / "out", program=program).run()

    assert (result["answered"], result["failed"]) == (2, 0)
    assert [row["label"] for row in read(tmp_path / "out")] == ["mail", "spam"]


class Tracing(dspy.Module):
    """Answers with how many answers there are in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = Classify(SPAM, "Sort.")

    def forward(self, text: str) -> dspy.Prediction:
        self.predict(text=text)
        return dspy.Prediction(label=str(len(dspy.settings.trace)))


def test_a_trace_holds_the_answers_of_one_row(tmp_path: Path) -> None:
    batch(table(tmp_path / "in.csv", texts(3)), tmp_path / "out", program=Tracing()).run()

    assert [row["label"] for row in read(tmp_path / "out")] == ["1", "1", "1"]


class Person(pydantic.BaseModel):
    name: str
    age: int = 30


class Greeting(dspy.Signature):
    """Greet."""

    person: Person = dspy.InputField()
    label: str = dspy.OutputField()


class Greeted(dspy.Module):
    """Takes a record, as an object of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = Generate(Greeting)

    def forward(self, person: Person) -> Any:
        return dspy.Prediction(label=f"{person.name}, {person.age}: {self.predict(person=person).label}")


def test_a_record_of_json_lines_is_an_object_of_its_class_and_one_that_isnt_of_it_isnt_asked(tmp_path: Path) -> None:
    people = [{"name": "Ada"}, {"age": 3}, {"name": "Bo", "age": 4}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"person": person}) + "\n" for person in people), encoding="utf-8")
    told = batch(source, tmp_path / "out", program=Greeted(), inputs={"person": Person}).run()
    lines = (tmp_path / "out" / "part-00000.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["Ada, 30: mail", "Bo, 4: mail"]
    assert told["answered"] == 2
    [failure] = failures(tmp_path / "out")
    assert failure["reason"] == f"{source}, row 2, person: {{'age': 3}} is no Person: name: Field required."


class Sized(dspy.Module):
    """Declares a number, and answers with whatever the text is."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict(declare("text -> size: int", "Measure."))

    def forward(self, text: str) -> dspy.Prediction:
        endless: list[Any] = []
        endless.append(endless)
        odd = {"large": 2**63, "words": "many", "endless": endless}
        return dspy.Prediction(size=odd.get(text, len(text)))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_answer_that_cannot_be_written_down_fails_its_row_and_the_batch_ends(kind: str, tmp_path: Path) -> None:
    given = ["large", "words", "endless"] if kind == "parquet" else ["endless"]
    frame = pd.DataFrame({"text": [*given, "abc", *given, "de"]})
    if kind == "parquet":
        frame.to_parquet(tmp_path / "in.parquet")
    else:
        frame.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    out = tmp_path / "out"
    for _ in range(2):
        result = batch(tmp_path / f"in.{kind}", out, program=Sized(), shard_rows=len(given)).run()
        assert (result["answered"], result["failed"], result["shards"]) == (2, 2 * len(given), 2)
    [*parts] = sorted(out.iterdir())
    wholes = [pd.read_parquet(part) if kind == "parquet" else pd.read_json(part, lines=True) for part in parts]
    assert [list(row) for whole in wholes for row in whole.to_numpy()] == [["abc", 3], ["de", 2]]
    told = [row["reason"] for row in failures(out)[: len(given)]]
    assert all(reason.startswith(f"the answer can't be written as {kind.upper()}: ") for reason in told)
    if kind == "parquet":
        assert "size: 'many' is no int64" in told[1]


def test_a_routed_program_says_who_answered(tmp_path: Path, two_regions: Router) -> None:
    program = Experts(Classify(SPAM, "Default."), {"region 1": Classify(SPAM, "Own.")}, two_regions)
    result = batch(table(tmp_path / "in.csv", ["a prize", "lunch"]), tmp_path / "out", program=program).run()
    assert result["columns"] == ["label", "route_expert", "route_region", "route_nearest", "route_distance"]
    assert [(row["label"], row["route_expert"], row["route_region"]) for row in read(tmp_path / "out")] == [
        ("spam", "region 1", "region 1"),
        ("mail", "default", "region 2"),
    ]


def test_missing_columns_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    source = table(tmp_path / "in.csv", texts(2))
    with pytest.raises(DataError, match="has no column 'question'; it has text"):
        batch(source, tmp_path / "out", program=Generate("question -> answer"), inputs={"question": str})
    assert not (tmp_path / "out.batch").exists()


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_an_optional_column_may_be_missing_as_in_a_compile(name: str, tmp_path: Path) -> None:
    program = Generate("text, hint: str | None -> answer")
    inputs: dict[str, Any] = {"text": str, "hint": str | None}
    frame = pd.DataFrame({"text": ["a", "b"]})
    if name == "in.csv":
        frame.to_csv(tmp_path / name, index=False)
    else:
        frame.to_json(tmp_path / name, orient="records", lines=True)
    lm = simulated(lambda request: "x")
    result = batch(tmp_path / name, tmp_path / "out", lm, program=program, inputs=inputs).run()
    assert (result["answered"], result["columns"]) == (2, ["answer"])


def test_columns_of_json_lines_are_those_of_all_rows(tmp_path: Path) -> None:
    rows = [{"n": 1}, {"text": "a prize", "n": 2}, {"text": "lunch", "label": "x"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    result = batch(source, tmp_path / "out").run()
    assert [result[name] for name in ("answered", "failed", "unusable")] == [2, 0, 1]
    assert result["columns"] == ["predicted_label"]
    assert [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()] == [
        {"text": "a prize", "n": 2, "predicted_label": "spam"},
        {"text": "lunch", "label": "x", "predicted_label": "mail"},
    ]


def test_the_current_folder_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table(tmp_path / "in.csv", texts(3))
    (tmp_path / "answers").mkdir()
    monkeypatch.chdir(tmp_path / "answers")
    assert [batch(source, Path()).run()["billed_calls"] for _ in range(2)] == [3, 0]
    assert [path.name for path in Path().iterdir()] == ["part-00000.csv"]
    assert (tmp_path / "answers.batch" / "manifest.json").is_file()
    with pytest.raises(RunError, match=r"\.\. is there already, and from no batch"):
        batch(source, Path("..")).run()


def test_a_loaded_program_s_own_batch_answers_in_order(tmp_path: Path) -> None:
    lm = simulated(judged)
    artifact.save(Classify(SPAM, "Sort."), tmp_path / "program", evidence={}, lm=lm.model)
    rows = [dspy.Example(text=text).with_inputs("text") for text in texts(20)]
    with dspy.context(lm=lm):
        answers: Any = preceptor.load(tmp_path / "program").batch(rows, num_threads=4, disable_progress_bar=True)
    assert [answer.label for answer in answers] == ["mail", "spam"] * 10
    assert Counter(prompt(request) for request in asked(lm)) == Counter(f"text: {text}" for text in texts(20))
