"""A model on Ray: real workers, started once for all tests here."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dspy
import pytest

from preceptor.batch import Batch, open_source
from preceptor.cli import run
from preceptor.errors import BudgetExhausted, ConfigError, ModelError
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.lm.workers import RayEngine, RayLM
from preceptor.modules import Classify
from preceptor.scoring.evaluate import Evaluator, Job
from preceptor.scoring.metrics import wrap
from preceptor.testing import Simulated, prompt, simulated

ray = pytest.importorskip("ray", reason="the extra `ray` isn't installed")
SPAM = "text -> label: Literal['spam', 'mail']"


@dataclass(frozen=True)
class Pool:
    """A model in two workers, which write down their process and what they are asked."""

    lm: dspy.LM
    log: Path
    dies: Path

    def said(self, about: str) -> list[str]:
        """Return what was asked about something, in any order."""
        lines = (line.split(" ", 1)[1] for line in self.log.read_text().splitlines())
        return [line for line in lines if about in line]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Start Ray, once for all tests here; a worker dies at a request that ends with what the file `dies` says."""
    folder = tmp_path_factory.mktemp("pool")
    yield Pool(RayLM(noted(folder / "log", folder / "dies"), 2), folder / "log", folder / "dies")
    ray.shutdown()


def noted(log: Path, dies: Path) -> Callable[[], dspy.LM]:
    """Return what makes the model; a closure, which Ray sends to workers by value."""

    def make() -> dspy.LM:
        def answer(request: dspy.lm15.Request) -> str:
            text = prompt(request)
            with suppress(FileNotFoundError):  # the other worker may take it away at any moment
                if text.endswith(dies.read_text()):
                    dies.unlink()
                    os._exit(1)
            with log.open("a") as file:
                file.write(f"{os.getpid()} {text}\n")
            if text.endswith(" 13"):
                raise dspy.lm15.InvalidRequestError("no such luck")
            return "spam" if "prize" in text else "mail"

        with log.open("a") as file:
            file.write(f"{os.getpid()} made\n")
        return simulated(answer)

    return make


def table(path: Path, count: int, about: str = "row") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([f"{about} {'a prize' if number % 2 else 'lunch'} {number}"] for number in range(count))
    return path


def batch(source: Path, out: Path, lm: dspy.LM, budget: Budget | None = None) -> Batch:
    program = Classify(SPAM, "Sort.")
    rows = open_source(str(source))
    given = {"text": str}
    return Batch(program=program, identity="", inputs=given, lm=lm, source=rows, out=out, budget=budget or Budget())


def labels(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def test_workers_answer_as_one_process_does_each_call_once_and_each_model_made_once(tmp_path: Path, pool: Pool) -> None:
    source = table(tmp_path / "in.csv", 200, "first")
    here = batch(source, tmp_path / "here.csv", noted(tmp_path / "log", tmp_path / "dies")()).run()
    there = batch(source, tmp_path / "there.csv", pool.lm).run()

    assert labels(tmp_path / "there.csv") == labels(tmp_path / "here.csv")
    assert len(labels(tmp_path / "there.csv")) == 199
    for result in (here, there):
        assert (result["answered"], result["failed"], result["billed_calls"]) == (199, 1, 199)
    assert len(pool.said("first")) == len(set(pool.said("first"))) == 200
    assert len(pool.said("made")) == 2
    processes = {line.split()[0] for line in pool.log.read_text().splitlines()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_answers_are_in_the_driver_s_ledger_so_that_budget_and_resume_hold(tmp_path: Path, pool: Pool) -> None:
    source = table(tmp_path / "in.csv", 200, "second")
    with pytest.raises(BudgetExhausted):
        batch(source, tmp_path / "out.csv", pool.lm, Budget(calls=150)).run()
    asked = set(pool.said("second"))
    assert 64 <= len(asked) <= 150
    result = batch(source, tmp_path / "out.csv", pool.lm).run()
    assert (result["answered"], result["calls"]) == (199, 199)
    answered = [text for text in pool.said("second") if not text.endswith(" 13")]
    assert len(answered) == len(set(answered)) == 199


def test_an_evaluation_scores_on_workers_as_it_does_here(pool: Pool, tmp_path: Path) -> None:
    rows = [dspy.Example(text=f"third prize {number}", label="spam").with_inputs("text") for number in range(150)]
    jobs = [Job(Classify(SPAM, "Sort."), row) for row in rows]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    metered = Meter(ledger, Account(Budget())).wrap(pool.lm)
    outcomes = Evaluator(metered, wrap("accuracy", "label"), "label", together=True).run(jobs)
    assert [outcome.score for outcome in outcomes].count(1.0) == 149
    assert [at for at, outcome in enumerate(outcomes) if outcome.kind == "failed"] == [13]
    assert len(ledger) == 149
    ledger.close()


def test_the_model_s_name_settings_and_abilities_are_its_own(pool: Pool) -> None:
    own = simulated(lambda request: "x")
    assert isinstance(own.engine, Simulated)
    assert isinstance(pool.lm.engine, RayEngine)
    assert (pool.lm.model, pool.lm.kwargs) == (own.model, own.kwargs)
    assert pool.lm.engine.supported_params == own.engine.supported_params
    assert pool.lm.engine.embedding_space == own.engine.embedding_space
    assert pool.lm.engine.supports_choices is False
    with pytest.raises(dspy.LMError, match="no such luck"):
        pool.lm("number 13")


def test_a_worker_that_dies_is_started_again_and_asked_again(pool: Pool) -> None:
    before = len(pool.said("made"))
    pool.dies.touch()
    assert pool.lm("fourth prize")[0] == "spam"
    assert len(pool.said("made")) == before + 1


def test_a_worker_that_dies_amid_many_rows_loses_none_and_mixes_up_none(tmp_path: Path, pool: Pool) -> None:
    source = table(tmp_path / "in.csv", 130, "fifth")
    pool.dies.write_text(" 45")  # after five times eight answers have been sent
    result = batch(source, tmp_path / "out.csv", pool.lm).run()
    assert not pool.dies.exists()
    [failed] = (tmp_path / "out.csv.batch" / "failed.jsonl").read_text().splitlines()
    assert "no such luck" in failed
    assert (result["answered"], result["failed"], result["billed_calls"]) == (129, 1, 129)
    told = labels(tmp_path / "out.csv")
    assert [label for _, label in told] == ["spam" if "prize" in text else "mail" for text, _ in told]


@pytest.mark.usefixtures("pool")
def test_a_model_that_cannot_be_loaded_and_workers_that_cannot_be_are_refused() -> None:
    def make() -> dspy.LM:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match=r"A worker of Ray can't load the model: .*no such model"):
        RayLM(make, 1)
    with pytest.raises(ConfigError, match="workers >= 1, got 0"):
        RayLM(make, 0)


@pytest.mark.usefixtures("pool")
def test_weights_that_cannot_be_read_in_a_worker_are_told_at_once() -> None:
    class Unreadable:  # a closure's own, which Ray sends by value
        supports_choices = False

        def complete(self, request: dspy.lm15.Request) -> dspy.lm15.Response:
            raise AssertionError("nobody asks")

        def load(self) -> None:
            raise ModelError("cut off")

    with pytest.raises(ModelError, match=r"A worker of Ray can't load the model: .*cut off"):
        RayLM(lambda: dspy.LM("late", engine=Unreadable()), 1)


@pytest.mark.usefixtures("pool", "smollm")
def test_one_command_runs_here_and_on_ray_with_the_same_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in.csv", 6)
    command = ["batch", SPAM, str(source), "--instructions", "Sort.", "--lm", "local/smollm2-135m"]
    assert run([*command[:3], str(tmp_path / "here.csv"), *command[3:]]) == 0
    capfd.readouterr()
    assert run([*command[:3], str(tmp_path / "there.csv"), *command[3:], "--engine", "ray:1", "--json"]) == 0
    assert capfd.readouterr().out.startswith("{\n")
    assert labels(tmp_path / "there.csv") == labels(tmp_path / "here.csv")


def test_workers_are_ray_s_and_the_model_is_local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["batch", SPAM, str(table(tmp_path / "in.csv", 2)), str(tmp_path / "out")]
    assert run([*command, "--engine", "dask"]) == 2
    assert "'dask' is neither ray nor ray:<number of workers>." in capsys.readouterr().err
    assert run([*command, "--engine", "ray", "--lm", "openai/gpt"]) == 2
    assert "Ray runs models of its own process, local/<id>, not openai/gpt" in capsys.readouterr().err
