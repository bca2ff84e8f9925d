"""The ledger and the run folder on a full disk, after kills, with damaged files, and with others at the same place."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import RunError
from preceptor.lm.ledger import Answer, Call, Ledger
from preceptor.modules import Classify
from preceptor.run import open_run, read_run
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.teleprompters import APE
from preceptor.testing import asked, prompt, simulated, system

PARTS: dict[str, Any] = {"metric": "accuracy"}
TRIAL = Trial(Candidate({"predict": "Sort."}), (0,), (Outcome("scored", 1.0),), 1.0)


def call(text: str) -> Call:
    return Call(Request(model="m", messages=(Message.user(text),)))


def answer(text: str) -> Answer:
    message = Message.assistant([TextPart(text)])
    return Answer(Response(None, "m", message, finish_reason="stop", usage=Usage(1, 1)), 2, 0.0, 0.0)


def write(path: str, name: str, first: int, last: int) -> None:
    """Append answers one by one and say so after each; those below 100 are everybody's, the others `name`'s own."""
    ledger = Ledger(Path(path))
    number = first
    while number < last:
        text = f"{'' if number < 100 else name}{number}"
        try:
            ledger.write([(call(text), answer(text))])
        except RunError as error:
            say(f"error {error}")
            time.sleep(0.05)
        else:
            say(f"wrote {number}")
            number += 1
    ledger.close()


def write_on_a_full_disk(path: str, name: str, first: int, last: int) -> None:
    """Write; whoever started it can make room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    write(path, name, first, last)


def open_all(folder: str, count: int) -> None:
    """Open new ledgers, one after the other."""
    for number in range(count):
        Ledger(Path(folder) / f"{number}.sqlite").close()


def compile_slowly(folder: str, seconds: float) -> None:
    """Compile with a model that takes so long for an answer."""
    lm = knowing(seconds)
    say(f"gain {compiled(lm, Path(folder))['gain']}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def nurse() -> None:
    """Fork a process for every line of standard input; what it says goes to the file named there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    say("ready")
    for line in sys.stdin:
        name, arguments, out = json.loads(line)
        if os.fork() == 0:
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            say(str(os.getpid()))
            try:
                globals()[name](*arguments)
                say("done")
            except RunError as error:
                say(f"refused {error}")
            finally:
                os._exit(0)


class Job:
    """A process that runs one of the functions above.

    Attributes:
        pid: Its number.
        said: Its lines so far.
    """

    def __init__(self, nursery: subprocess.Popen[str], out: Path, name: str, *arguments: Any) -> None:
        self._out = out
        assert nursery.stdin is not None
        nursery.stdin.write(
            json.dumps([name, [str(a) if isinstance(a, Path) else a for a in arguments], str(out)]) + "\n"
        )
        nursery.stdin.flush()
        self.wait_for(lambda lines: bool(lines))
        self.pid = int(self._lines()[0])

    def _lines(self) -> list[str]:
        text = self._out.read_text(encoding="utf-8") if self._out.is_file() else ""
        return text.split("\n")[:-1]

    @property
    def said(self) -> list[str]:
        return self._lines()[1:]

    @property
    def wrote(self) -> list[int]:
        return [int(line.removeprefix("wrote ")) for line in self.said if line.startswith("wrote ")]

    def wait_for(self, is_true: Callable[[list[str]], bool]) -> None:
        """Wait until something is true of its lines, the first of which is its number."""
        end = time.monotonic() + 120
        while not is_true(self._lines()):
            assert time.monotonic() < end, self._lines()[-3:]
            time.sleep(0.002)

    def end(self) -> None:
        """Wait for its death."""
        end = time.monotonic() + 120
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < end, self._lines()[-3:]
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.end()


Start = Callable[..., Job]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything, to fork others from."""
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-c", "import test_ledger_faults; test_ledger_faults.nurse()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def start(nursery: subprocess.Popen[str], tmp_path: Path) -> Iterator[Start]:
    started: list[Job] = []

    def job(name: str, *arguments: Any) -> Job:
        started.append(Job(nursery, tmp_path / f"said-{len(started)}", name, *arguments))
        return started[-1]

    yield job
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            each.kill()


def found(ledger: Ledger, texts: list[str]) -> list[str]:
    """Return those texts whose answer is there as it was written."""
    return [text for text in texts if ledger.find(call(text).key) == answer(text)]


def test_two_processes_append_at_once_and_nothing_is_lost_or_doubled(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "ledger.sqlite"
    writers = [start("write", path, name, 0, 500) for name in ("a", "b")]
    for writer in writers:
        writer.end()

    assert [writer.said for writer in writers] == [[*(f"wrote {n}" for n in range(500)), "done"]] * 2
    texts = [str(n) for n in range(100)] + [f"{name}{n}" for name in "ab" for n in range(100, 500)]
    ledger = Ledger(path)
    assert found(ledger, texts) == texts
    assert len(ledger) == len(texts) == 900
    ledger.close()


def test_many_processes_open_new_ledgers_at_the_same_moment(tmp_path: Path, start: Start) -> None:
    openers = [start("open_all", tmp_path, 200) for _ in range(4)]
    for opener in openers:
        opener.end()

    assert [opener.said for opener in openers] == [["done"]] * 4


def test_a_writer_on_a_full_disk_says_so_and_goes_on_when_there_is_space(tmp_path: Path, start: Start) -> None:
    path, texts = tmp_path / "ledger.sqlite", [f"{'' if n < 100 else 'a'}{n}" for n in range(400)]
    writer = start("write_on_a_full_disk", path, "a", 0, 400)
    writer.wait_for(lambda lines: lines[-1].startswith("error"))

    assert writer.said[-1].startswith(f"error Can't write 1 answers to {path}: ")
    assert writer.said[-1].endswith("Free some space, then resume the run.")
    written = writer.wrote
    assert 0 < len(written) < 400
    reader = Ledger(path)
    assert found(reader, texts) == texts[: len(written)]

    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.end()

    assert writer.wrote == list(range(400))
    assert found(reader, texts) == texts
    reader.close()


def test_a_writer_killed_ten_times_loses_nothing_it_reported(tmp_path: Path, start: Start) -> None:
    path, reported = tmp_path / "ledger.sqlite", 0
    for kill in range(10):
        writer = start("write", path, "a", reported, 10**6)
        least = 3 + 7 * kill
        writer.wait_for(lambda lines: len(lines) > least)  # noqa: B023  it is called before the next one
        writer.kill()
        assert writer.wrote == list(range(reported, reported + len(writer.said)))
        reported += len(writer.said)

    assert reported >= 10 * 3 + 7 * 45
    texts = [f"{'' if n < 100 else 'a'}{n}" for n in range(reported)]
    ledger = Ledger(path)
    assert found(ledger, texts) == texts
    assert len(ledger) in (reported, reported + 1)
    ledger.close()


BATCHES, ROWS = 20, 25
TEXTS = [[f"{batch} {row}" for row in range(ROWS)] for batch in range(BATCHES)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a killed process leaves it: the file and its log, with twenty batches of answers."""
    folder = tmp_path_factory.mktemp("killed")
    ledger = Ledger(folder / "ledger.sqlite")
    for texts in TEXTS:
        ledger.write([(call(text), answer(text)) for text in texts])
    left = folder / "left"
    left.mkdir()
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        shutil.copy(folder / name, left / name)
    ledger.close()
    return left


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to be damaged."""
    shutil.copytree(killed, tmp_path / "left")
    return tmp_path / "left"


@pytest.fixture
def closed(left: Path) -> Path:
    """Return a folder whose ledger was closed: one file."""
    Ledger(left / "ledger.sqlite").close()
    assert [path.name for path in left.iterdir()] == ["ledger.sqlite"]
    return left


def whole_batches(folder: Path) -> int:
    """Return how many of the first batches are there; nothing else may be, and one more can be written."""
    ledger = Ledger(folder / "ledger.sqlite")
    there = [len(found(ledger, texts)) for texts in TEXTS]
    count = there.count(ROWS)
    assert there == [ROWS] * count + [0] * (BATCHES - count)
    assert len(ledger) == count * ROWS
    ledger.write([(call("after"), answer("after"))])
    assert found(ledger, ["after"]) == ["after"]
    ledger.close()
    return count


@pytest.mark.parametrize("size", [1, 23, 24, 1000, 4095, 4120, 20_000])
def test_a_last_write_that_was_torn_takes_nothing_else_along(left: Path, size: int) -> None:
    log = left / "ledger.sqlite-wal"
    whole = log.stat().st_size
    with log.open("ab") as file:  # a batch on its way: frames that look like the last ones, but were never committed
        file.write(log.read_bytes()[-8240:][:size])
    assert log.stat().st_size > whole

    assert whole_batches(left) == BATCHES


@pytest.mark.parametrize("size", [1, 24, 4096, 30_000])
def test_a_log_cut_short_keeps_the_whole_batches_before_the_cut(left: Path, size: int) -> None:
    log = left / "ledger.sqlite-wal"
    os.truncate(log, log.stat().st_size - size)

    assert whole_batches(left) == BATCHES - 1


@pytest.mark.parametrize("seed", range(10))
def test_a_log_with_a_flipped_bit_keeps_the_whole_batches_before_it(left: Path, seed: int) -> None:
    log = left / "ledger.sqlite-wal"
    content, rng = bytearray(log.read_bytes()), random.Random(seed)
    at = rng.randrange(len(content) * 9 // 10, len(content))
    content[at] ^= 1 << rng.randrange(8)
    log.write_bytes(content)

    assert BATCHES * 8 // 10 <= whole_batches(left) < BATCHES


def overwritten(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first bytes": lambda path: overwritten(path, 0, b"\x00" * 16),
    "first page": lambda path: overwritten(path, 0, b"\xff" * 4096),
    "page size": lambda path: overwritten(path, 16, b"\x03\x03"),
    "a page cut off": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "half of it cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other content": lambda path: overwritten(path, 0, b"These are my notes. " * 1000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_never_taken_for_an_empty_one(closed: Path, damage: Callable[[Path], None]) -> None:
    path = closed / "ledger.sqlite"
    damage(path)
    with pytest.raises(RunError, match=rf"Can't (open|read) the ledger {path}: "):
        whole_batches(closed)


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_flipped_bits_gives_answers_or_a_run_error(closed: Path, seed: int) -> None:
    path, rng = closed / "ledger.sqlite", random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)

    told = ""
    try:
        ledger = Ledger(path)
        answers = [ledger.find(call(text).key) for texts in TEXTS for text in texts]
        ledger.close()
    except RunError as error:
        told, answers = str(error), []

    assert str(path) in told or sum(one is not None for one in answers) > 450


def test_an_answer_that_ends_in_half_a_character_is_kept_and_harms_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    texts = ["a smile \ud83d", "whole", "\udc00"]
    for text in texts:
        ledger.write([(call(text), answer(text))])
    assert found(ledger, texts) == texts
    ledger.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder of a run that was started, scored a trial and ended."""
    folder = tmp_path / "run"
    with open_run(folder, PARTS) as run:
        run.ledger.write([(call("q"), answer("q"))])
        run.write_trials([TRIAL])
    return folder


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_run_whose_ledger_is_gone_is_refused_and_its_log_left_alone(run_folder: Path, how: str) -> None:
    ledger, log = run_folder / "ledger.sqlite", run_folder / "ledger.sqlite-wal"
    log.write_bytes(b"answers")
    ledger.unlink()
    if how == "empty":
        ledger.touch()

    message = rf"^{ledger}, which held every answer of this run, is {how}\. Put it back, or delete {run_folder} to"
    with pytest.raises(RunError, match=message), open_run(run_folder, PARTS):
        pass

    assert log.read_bytes() == b"answers"


def test_a_run_whose_ledger_came_without_its_log_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", PARTS) as run:
        run.ledger.write([(call("q"), answer("q"))])
        run.write_trials([TRIAL])
        shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm", ".lock"))

    message = r"copy/ledger\.sqlite has no answers, but .* has trials .*ledger\.sqlite-wal next to it"
    with pytest.raises(RunError, match=message), open_run(tmp_path / "copy", PARTS):
        pass


def test_trials_with_a_torn_last_line_are_begun_anew(run_folder: Path) -> None:
    with (run_folder / "trials.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"instructions": {"pre')
    with open_run(run_folder, PARTS) as run:
        run.write_trials([TRIAL])

    assert (run_folder / "trials.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize("text", ["{oops", "[]", '{"fingerprints": []}', "[" * 100_000, '{"command": 1}'])
def test_a_damaged_run_file_is_named_and_the_ledger_survives_its_loss(run_folder: Path, text: str) -> None:
    (run_folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"run\.json is (missing or unreadable|damaged)"), open_run(run_folder, PARTS):
        pass

    (run_folder / "run.json").unlink()
    with open_run(run_folder, PARTS) as run:
        assert len(run.ledger) == 1


def test_texts_with_half_a_character_reach_the_files_as_their_escape(tmp_path: Path) -> None:
    parts = {"trainset": [{"text": "\ud83d"}]}
    with open_run(tmp_path / "run", parts) as run:
        run.ledger.write([(call("q"), answer("q"))])
        run.write_trials([Trial(Candidate({"predict": "Sort \ud83d."}), (0,), (Outcome("scored", 1.0),), 1.0)])
        run.write_result({"verdict": "\ud83d"})

    assert '"Sort \\ud83d."' in (tmp_path / "run" / "trials.jsonl").read_text(encoding="utf-8")
    assert '"\\ud83d"' in (tmp_path / "run" / "result.json").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="belongs to another trainset"), open_run(tmp_path / "run", {"trainset": ["x"]}):
        pass


def rows(count: int) -> list[dspy.Example]:
    words = [["yes", "no"][n % 2] for n in range(count)]
    return [dspy.Example(text=f"row {n} {word}", label=word).with_inputs("text") for n, word in enumerate(words)]


def knowing(seconds: float = 0.0) -> dspy.LM:
    """A model that knows the label when it is told to look at the last word, and takes its time."""

    def answered(request: Request) -> str:
        time.sleep(seconds)
        if not system(request):
            return f"Answer with the last word. ({len(prompt(request))})"
        return prompt(request).split()[-1] if "last word" in system(request) else "yes"

    return simulated(answered)


def compiled(lm: dspy.LM, folder: Path) -> dict[str, Any]:
    method = APE(metric="accuracy", lm=lm, run_dir=folder, candidates=3, demos=2, subsamples=3)
    program: Any = method.compile(Classify("text -> label: Literal['yes', 'no']", "Sort."), trainset=rows(24))
    evidence: dict[str, Any] = program.evidence.stable()
    return evidence


def test_a_compile_on_a_full_disk_ends_with_a_run_error_and_asks_nothing_twice(tmp_path: Path) -> None:
    whole = knowing()
    expected = compiled(whole, tmp_path / "whole")

    lm, limits = knowing(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"Free some space, then resume the run|Can't write"):
            compiled(lm, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    recorded, at_first = len(ledger), len(asked(lm))
    ledger.close()
    assert 0 < recorded <= at_first < len(asked(whole))

    assert compiled(lm, tmp_path / "run") == expected
    assert len(asked(lm)) - at_first == len(asked(whole)) - recorded


def test_two_threads_can_not_compile_into_one_folder_either(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with open_run(tmp_path, PARTS):
                pass
        except RunError as error:
            refused.append(str(error))

    with open_run(tmp_path, PARTS):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert refused == [f"Another process is using the run folder {tmp_path}. Wait for it, or choose another folder."]


def test_of_two_compiles_in_one_folder_the_second_is_refused_until_the_first_is_dead(
    tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    first = start("compile_slowly", run, 60)
    first.wait_for(lambda lines: (run / "run.json").is_file())
    fingerprints = read_run(run)

    second = start("compile_slowly", run, 0.0)
    second.end()
    assert second.said == [
        f"refused Another process is using the run folder {run}. Wait for it, or choose another folder."
    ]
    assert first.said == []

    first.kill()
    third = start("compile_slowly", run, 0.0)
    third.end()
    assert third.said == ["gain 0.5", "done"]
    ended = read_run(run)
    assert len(ended.pop("looks")) == 1
    assert ended == fingerprints
