"""The ledger: answers survive whatever happens to the process, whole batches only."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart, TokenLogprob, TopLogprob, Usage

from preceptor.errors import RunError
from preceptor.lm.ledger import Answer, Call, Ledger, drawn, rollout


def call(text: str, sample: int = 0, **config: Any) -> Call:
    return Call(Request(model="m", messages=(Message.user(text),), system="Be brief.", config=Config(**config)), sample)


def answer(text: str = "yes") -> Answer:
    top = (TopLogprob("yes", -0.25), TopLogprob("no", -1.5))
    response = Response(
        id=None,
        model="m",
        message=Message.assistant([TextPart(text)]),
        finish_reason="stop",
        usage=Usage(input_tokens=11, output_tokens=1),
        logprobs=(TokenLogprob(text, -0.25, top=top),),
    )
    return Answer(response, 12, 0.125, 0.5)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


@contextmanager
def files_at_most(size: int) -> Generator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_answer_comes_back_as_it_was_with_its_log_probabilities(ledger: Ledger) -> None:
    asked, given = call("Is water wet?", 3, temperature=0.5), answer("señor ✓")
    ledger.write([(asked, given)])
    assert ledger.find(asked.key) == given


def test_what_was_never_asked_is_not_found(ledger: Ledger) -> None:
    assert ledger.find(call("never").key) is None
    assert len(ledger) == 0


def test_a_rollout_of_any_number_has_a_place_in_the_file(ledger: Ledger) -> None:
    with rollout(1_790_000_000_123_456_789):
        asked = call("q", drawn())
    ledger.write([(asked, answer("yes"))])
    assert ledger.find(asked.key) == answer("yes")
    with rollout(3):
        assert drawn() == 3_000_000


def test_equal_requests_have_equal_keys() -> None:
    assert call("q", temperature=0.5).key == call("q", temperature=0.5).key
    assert len(call("q").key) == 64


@pytest.mark.parametrize(
    "other",
    [
        call("q", sample=1),
        call("Q"),
        call("q", temperature=1.0),
        call("q", seed=1),
        call("q", extensions={"choices": ["a"]}),
        Call(Request(model="other", messages=(Message.user("q"),), system="Be brief.")),
        Call(Request(model="m", messages=(Message.user("q"),))),
    ],
    ids=["sample", "text", "temperature", "seed", "choices", "model", "system"],
)
def test_whatever_differs_makes_another_key(other: Call) -> None:
    assert other.key != call("q").key


def test_a_second_answer_to_the_same_call_changes_nothing(ledger: Ledger) -> None:
    ledger.write([(call("q"), answer("first"))])
    ledger.write([(call("q"), answer("second"))])
    assert ledger.find(call("q").key) == answer("first")
    assert len(ledger) == 1


def test_answers_survive_reopening(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite")
    first.write([(call(str(n)), answer(str(n))) for n in range(3)])
    first.close()

    again = Ledger(tmp_path / "ledger.sqlite")

    assert [again.find(call(str(n)).key) for n in range(3)] == [answer(str(n)) for n in range(3)]
    again.close()


def test_two_open_ledgers_see_each_others_answers(ledger: Ledger) -> None:
    other = Ledger(ledger.path)
    ledger.write([(call("q"), answer())])
    assert other.find(call("q").key) == answer()
    other.close()


def test_a_batch_is_written_all_or_none(ledger: Ledger) -> None:
    good = [(call(str(n)), answer()) for n in range(5)]
    bad = (call("bad"), Answer(answer().response, "twelve", 0.0, 0.0))  # type: ignore[arg-type]  # the table is strict
    with pytest.raises(RunError, match=r"Can't write 6 answers to .*cannot store TEXT value in INTEGER"):
        ledger.write([*good, bad])
    assert len(ledger) == 0

    ledger.write(good)

    assert len(ledger) == 5


def test_a_full_disk_is_named_with_what_to_do_and_keeps_what_was_written(ledger: Ledger) -> None:
    ledger.write([(call(f"before {n}"), answer()) for n in range(10)])
    batch = [(call(f"{n} {'long ' * 200}"), answer()) for n in range(500)]
    with (
        files_at_most(200_000),
        pytest.raises(RunError, match=r"Can't write 500 answers to .*\. Free some space, then resume the run\."),
    ):
        ledger.write(batch)
    assert len(ledger) == 10

    ledger.write(batch)

    assert len(ledger) == 510
    assert ledger.find(batch[499][0].key) == answer()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"Can't open the ledger {tmp_path}/missing/ledger: unable to open"):
        Ledger(tmp_path / "missing" / "ledger")


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("These are my notes, not a database. " * 100)
    with pytest.raises(RunError, match=r"Can't open the ledger .*file is not a database"):
        Ledger(tmp_path / "ledger")


def test_many_threads_write_and_find_at_once(ledger: Ledger) -> None:
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for n in range(10):
                asked = call(f"{worker} {n}")
                ledger.write([(asked, answer(str(n)))])
                assert ledger.find(asked.key) == answer(str(n))
        except BaseException as error:  # noqa: BLE001  shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(ledger) == 160


WRITER = """
import sys
from pathlib import Path
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from preceptor.lm.ledger import Answer, Call, Ledger

ledger = Ledger(Path(sys.argv[1]))
message = Message.assistant([TextPart("yes")])
response = Response(id=None, model="m", message=message, finish_reason="stop", usage=Usage(1, 1))
for batch in range(10**6):
    calls = [Call(Request(model="m", messages=(Message.user(f"{batch} {row}"),))) for row in range(100)]
    ledger.write([(call, Answer(response, 2, 0.0, 0.0)) for call in calls])
    print(batch, flush=True)
"""


def test_a_killed_writer_leaves_whole_batches_and_all_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        reported = [int(next(writer.stdout)) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        reported += [int(line) for line in writer.stdout]
    assert writer.returncode == -signal.SIGKILL

    database = sqlite3.connect(path)
    [integrity] = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    ledger = Ledger(path)

    assert integrity == "ok"
    assert len(ledger) % 100 == 0
    assert len(ledger) // 100 in (len(reported), len(reported) + 1)
    last = Request(model="m", messages=(Message.user(f"{reported[-1]} 99"),))
    assert ledger.find(Call(last).key) is not None
    ledger.write([(call("after"), answer())])
    assert len(ledger) % 100 == 1
    ledger.close()


def test_a_ledger_alone_with_its_file_knows_what_was_there_and_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    before = Ledger(path)
    before.write([(call("early"), answer("one"))])
    before.close()

    alone = Ledger(path, is_alone=True)
    alone.write([(call("late"), answer("two"))])
    found = [alone.find(call(text).key) for text in ("early", "late", "never")]
    alone.close()
    assert found == [answer("one"), answer("two"), None]


def test_a_ledger_that_shares_its_file_finds_what_another_wrote(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    one, other = Ledger(path), Ledger(path)
    one.write([(call("hello"), answer("yes"))])
    assert other.find(call("hello").key) == answer("yes")
    one.close()
    other.close()


def test_what_this_process_gave_up_can_be_taken_back_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path)
    first.give_up({"old": ("LMError", "too long")})
    first.close()

    second = Ledger(path)
    second.give_up({"new": ("LMError", "no route"), "newer": ("LMError", "no route")})
    second.take_back()
    assert [second.given_up(key) for key in ("old", "new", "newer")] == [("LMError", "too long"), None, None]
    second.close()

    third = Ledger(path)
    assert [third.given_up(key) for key in ("old", "new", "newer")] == [("LMError", "too long"), None, None]
    third.close()
