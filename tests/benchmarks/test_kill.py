from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from dspy.lm15 import request_from_openai_chat

from preceptor.benchmarks import kill
from preceptor.benchmarks.kill import Life, lost, repeated
from preceptor.benchmarks.killed import answerer, digest
from preceptor.cli.tools import as_command
from preceptor.errors import ConfigError, RunError
from preceptor.lm.ledger import Answer, Call, Ledger
from preceptor.testing import Simulated, simulated


def life(asked: str, recorded: str, *, is_killed: bool = True) -> Life:
    """Return a life that asked one call per letter, one second after the other, from second 12 on."""
    calls = [(12.0 + at, letter) for at, letter in enumerate(asked)]
    return Life(10.0, 11.0, 20.0, is_killed, calls, Counter(recorded))


def test_a_call_in_flight_is_lost_in_the_life_that_asked_it_and_is_no_repetition() -> None:
    lives = [life("abc", "a"), life("bc", "ab"), life("cd", "abcd", is_killed=False)]
    assert lost(lives) == [2, 1, 0]
    assert repeated(lives) == 0


def test_a_recorded_call_that_is_asked_again_is_a_repetition() -> None:
    lives = [life("ab", "ab"), life("bc", "abc", is_killed=False)]
    assert repeated(lives) == 1


def test_equal_calls_are_counted_apart() -> None:
    lives = [life("aa", "a"), life("a", "aa", is_killed=False)]
    assert lost(lives) == [1, 0]
    assert repeated(lives) == 0
    assert repeated([life("aa", "aa"), life("a", "aa", is_killed=False)]) == 1


def test_a_life_goes_on_with_its_first_call_or_with_its_end_where_nothing_is_left_to_ask() -> None:
    assert life("a", "a").went_on == 12.0
    assert life("", "a", is_killed=False).went_on == 20.0
    assert life("", "a").went_on is None


def test_what_is_recorded_is_read_from_the_ledger_of_a_run_that_is_still_open(tmp_path: Path) -> None:
    lm = simulated(lambda request: "spam")
    assert isinstance(lm.engine, Simulated)
    messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "text: Win"}]
    asked = request_from_openai_chat({"model": lm.model, "messages": messages})
    answer = Answer(lm.engine.complete(asked), 3, 0.0, 0.1)

    assert kill.recorded(tmp_path) == Counter()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert kill.recorded(tmp_path) == Counter()
    ledger.write([(Call(asked), answer), (Call(asked, 1), answer)])
    assert kill.recorded(tmp_path) == Counter({digest(asked): 2})
    ledger.close()


def test_the_model_answers_equal_requests_equally_and_seeds_tell_requests_apart() -> None:
    messages = [{"role": "user", "content": "Write an instruction."}]
    requests = [request_from_openai_chat({"model": "m", "messages": messages, "seed": seed}) for seed in range(20)]
    first, second = answerer(), answerer()
    assert [first(request) for request in requests] == [second(request) for request in requests]
    assert len({digest(request) for request in requests}) == 20


@pytest.mark.parametrize("model", ["simulated", "http"])
def test_a_killed_compile_is_resumed_and_counted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kill.json"
    small = ["--kills", "1", "--seed", "18", "--set", "candidates=2", "--threads", "4"]
    as_command("kill", kill.run, ["--model", model, *small, "--out", str(out), "--json"])

    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    [row] = printed["measured"]
    assert (row["model"], row["method"], row["threads"], row["kills"]) == (model, "ape", 4, 1)
    assert row["runs"] == 1
    assert row["identical"] == row["same_calls"] == row["runs"]
    assert row["recorded_and_asked_again"] == 0
    assert row["in_flight_and_asked_again"] == row["most_in_flight"] <= 4
    assert row["calls"] > 160
    assert 0 <= row["seconds_of_replay"] < row["seconds_to_resume"]


def test_what_a_compile_died_of_is_told() -> None:
    with pytest.raises(RunError, match=r"The compile in .*whole ended with 1: (.|\n)*needs a model in this process"):
        as_command("kill", kill.run, ["--model", "simulated", "--set", "score=likelihood"])


def test_a_program_that_differs_is_told_by_its_files(tmp_path: Path) -> None:
    for run, text in (("whole", "a"), ("killed", "b")):
        (tmp_path / run / "program").mkdir(parents=True)
        for name in ("program.json", "evidence.json", "manifest.json"):
            (tmp_path / run / "program" / name).write_text(text if name == "evidence.json" else "same")
    assert kill._different(tmp_path / "whole", tmp_path / "killed") == ["evidence.json"]
    assert kill._different(tmp_path / "whole", tmp_path / "whole") == []


def test_an_unknown_model_or_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="No model 'gpt'; there are simulated, http, local"):
        as_command("kill", kill.run, ["--model", "gpt"])
    with pytest.raises(ConfigError, match="APE has no setting 'candles'"):
        as_command("kill", kill.run, ["--set", "candles=1"])
