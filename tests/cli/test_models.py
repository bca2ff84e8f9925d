"""The models that the commands ask: their settings, their addresses and their weights."""

from __future__ import annotations

from pathlib import Path

import dspy
import pytest

from preceptor import program as artifact
from preceptor.cli import run
from preceptor.cli.inputs import lm_of
from preceptor.errors import ConfigError
from preceptor.modules import Classify
from preceptor.testing import ChatServer

SPAM = "text -> label: Literal['spam', 'mail']"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = tmp_path / "rows.csv"
    lines = [f"{'Win a prize' if n % 2 else 'Lunch at noon'} {n},{'spam' if n % 2 else 'mail'}" for n in range(16)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("model", ["o3", "o4-mini", "gpt-5-mini"])
def test_a_model_that_reasons_is_asked_as_it_wants(rows: Path, tmp_path: Path, model: str) -> None:
    saved = tmp_path / "saved"
    artifact.save(Classify(SPAM, "Sort."), saved, evidence={}, lm=f"openai/{model}")
    with ChatServer(lambda body: "spam") as server:
        for target in ([SPAM, "--lm", f"openai/{model}"], [str(saved)]):
            assert run(["eval", *target, "--data", str(rows), "--api-base", server.url]) == 0
        bodies = [received.body for received in server.requests]

    assert len(bodies) == 2 * 16
    assert {body["max_completion_tokens"] for body in bodies} == {16_000}
    assert not [body for body in bodies if "temperature" in body or "max_tokens" in body]


def test_a_bound_too_small_to_reason_in_is_refused(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", SPAM, "--data", str(rows), "--lm", "openai/o3", "--max-tokens", "700"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "openai/o3 reasons before it answers, within --max-tokens: 16000 at least, not 700." in message


def test_what_is_no_name_of_a_model_is_refused(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", SPAM, "--data", str(rows), "--lm", "openai/"]) == 2
    assert "'openai/' is no language model: " in " ".join(capsys.readouterr().err.split())


def test_the_bound_of_an_answer_is_the_one_that_was_asked_for(rows: Path) -> None:
    with ChatServer(lambda body: "spam") as server:
        for more in ([], ["--max-tokens", "7"]):
            assert run(["eval", SPAM, "--data", str(rows), "--lm", "openai/m", "--api-base", server.url, *more]) == 0
        sent = [received.body["max_completion_tokens"] for received in server.requests]
    assert sent == [512] * 16 + [7] * 16


def test_a_signature_may_be_longer_than_the_name_of_a_file(rows: Path, tmp_path: Path) -> None:
    labels = ["spam", "mail", *(f"another label of many, number {n}" for n in range(40))]
    signature = f"text -> label: Literal[{', '.join(map(repr, labels))}]"
    knobs = ["--set", "candidates=1", "--budget", "calls=60", "--run", str(tmp_path / "run")]
    with ChatServer(lambda body: "spam") as server:
        given = ["--data", str(rows), "--lm", "openai/m", "--api-base", server.url]
        assert run(["compile", signature, *given, *knobs]) == 0
        assert run(["resume", str(tmp_path / "run")]) == 0
        assert run(["eval", signature, *given]) == 0
        assert run(["batch", signature, str(rows), str(tmp_path / "out.csv"), *given[2:]]) == 0


def test_a_proposer_has_an_address_of_its_own(rows: Path, tmp_path: Path) -> None:
    knobs = ["--set", "candidates=1", "--budget", "calls=60", "--run", str(tmp_path / "run")]
    with ChatServer(lambda body: "spam") as task, ChatServer(lambda body: "Is it spam?") as other:
        models = ["--lm", "openai/m", "--api-base", task.url, "--proposer", "openai/writer"]
        assert run(["compile", SPAM, "--data", str(rows), *models, "--proposer-api-base", other.url, *knobs]) == 0
        assert {received.body["model"] for received in task.requests} == {"m"}
        assert {received.body["model"] for received in other.requests} == {"writer"}


def test_a_program_of_a_server_of_ones_own_is_not_asked_of_the_provider(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, given = str(tmp_path / "run" / "program"), ["--data", str(rows)]
    knobs = ["--set", "candidates=1", "--budget", "calls=60", "--run", str(tmp_path / "run")]
    with ChatServer(lambda body: "spam") as server:
        address = ["--api-base", server.url]
        assert run(["compile", SPAM, *given, "--lm", "openai/m", *address, *knobs]) == 0
        assert "but for openai/m: no price is known" in capsys.readouterr().out
        assert server.url.partition("//")[2] not in (tmp_path / "run" / "program" / "program.json").read_text("utf-8")
        capsys.readouterr()
        for command in (
            ["eval", program, *given],
            ["eval", SPAM, program, *given],
            ["verify", program],
            ["batch", program, str(rows), str(tmp_path / "out.csv")],
            ["serve", program, "--port", "0"],
        ):
            assert run(command) == 2
            message = " ".join(capsys.readouterr().err.split())
            assert "was compiled with openai/m at an address of its own, which isn't kept. Give it with --a" in message
        assert run(["eval", program, *given, *address]) == run(["verify", program, *address]) == 0


def test_other_weights_than_those_named_are_refused(smollm: dspy.LM) -> None:
    assert lm_of("local/smollm2-135m").model == lm_of(smollm.model).model == smollm.model
    message = (
        rf"^The weights of local/smollm2-135m are others than those that are asked for: they are {smollm.model}, not "
        r"local/smollm2-135m@0123456789ab\. Get those back, or go on with these: --lm local/smollm2-135m\.$"
    )
    with pytest.raises(ConfigError, match=message):
        lm_of("local/smollm2-135m@0123456789ab")
