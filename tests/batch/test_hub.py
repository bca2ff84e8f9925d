"""`preceptor batch`, a process, over data sets of a hub on the loopback interface, asking a model behind HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preceptor import program as artifact
from preceptor.modules import Classify
from preceptor.testing import ChatServer
from preceptor.testing.hub import Repositories, card, commit, lines, parquet, serving

Held = dict[tuple[str, str], dict[str, bytes]]

SPAM = "text -> label: Literal['spam', 'mail']"
OLD = "0123456789" * 4
"""A commit that no branch stands for."""


def texts(count: int, start: int = 0) -> list[str]:
    return [f"{'a prize' if number % 2 else 'lunch'} {number}" for number in range(start, start + count)]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": text, "n": number} for number, text in enumerate(texts(count, start), start)]


def judged(text: str) -> str:
    return "spam" if "prize" in text else "mail"


@dataclass(frozen=True)
class Place:
    """A saved program, the server it asks, and the hub its rows come from."""

    folder: Path
    server: ChatServer
    hub: str
    seconds: int = 60
    """What the hub may take to say which files there are."""

    def command(self, source: str, *more: str) -> list[str]:
        given = [str(self.folder / "program"), source, str(self.folder / "out")]
        return [sys.executable, "-m", "preceptor", "batch", *given, "--api-base", self.server.url, "--json", *more]

    @property
    def environment(self) -> Mapping[str, str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        found = {
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_ETAG_TIMEOUT": str(self.seconds),
        }
        return {**known, **found, "OPENAI_API_KEY": "none"}

    def run(self, source: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = self.command(source, *more)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)

    def done(self, source: str, *more: str) -> dict[str, Any]:
        ended = self.run(source, *more)
        assert ended.returncode == 0, ended.stderr
        result: dict[str, Any] = json.loads(ended.stdout)
        return result

    def refused(self, source: str, *more: str) -> str:
        """Return the last line of what is said where a run ends for what the user can mend."""
        ended = self.run(source, *more)
        assert ended.returncode == 2, ended.stderr
        said = ended.stderr.splitlines()[-1]
        assert json.loads(ended.stdout) == {"error": said.removeprefix("Error: "), "exit_code": 2}
        return said

    @property
    def answers(self) -> pa.Table:
        return pa.concat_tables([pq.read_table(path) for path in sorted((self.folder / "out").glob("part-*.parquet"))])


@pytest.fixture
def repositories() -> Held:
    """Return what the hub has; a test may add to it, and change it."""
    configurations = {name: ["train", "test"] for name in ("long", "short")}
    return {
        ("someone/reviews", "main"): {"train.jsonl": lines(rows(30)), "test.jsonl": lines(rows(5, 100))},
        ("someone/reviews", OLD): {"train.jsonl": lines(rows(7))},
        ("someone/reviews", "refs/convert/parquet"): {"train.parquet": parquet(rows(9))},
        ("someone/both", "main"): {
            "README.md": card(configurations),
            "long/train-0.parquet": parquet(rows(6)),
            "long/test-0.parquet": parquet(rows(1)),
            "short/train-0.parquet": parquet(rows(3, 50)),
            "short/test-0.parquet": parquet(rows(2, 60)),
        },
    }


@pytest.fixture
def place(tmp_path: Path, repositories: Repositories) -> Iterator[Place]:
    artifact.save(Classify(SPAM, "Sort."), tmp_path / "program", evidence={}, lm="openai/model")
    with ExitStack() as opened:
        server = opened.enter_context(ChatServer(lambda body: judged(body["messages"][-1]["content"])))
        yield Place(tmp_path, server, opened.enter_context(serving(repositories)))


def asked(server: ChatServer) -> Counter[str]:
    return Counter(str(request.body["messages"][-1]["content"]) for request in server.requests)


def test_every_row_is_answered_once_though_a_budget_ended_and_is_written_as_parquet_with_its_types(
    place: Place, repositories: Held
) -> None:
    given: list[dict[str, Any]] = [
        {"text": text, "kind": number % 2, "scan": {"bytes": b"scan %d" % number, "path": f"{number}.png"}}
        for number, text in enumerate(texts(50))
    ]
    repositories["someone/scans", "main"] = {
        f"data/train-0000{part}-of-00002.parquet": parquet(given[part * 30 :][:30], group=10, kind=["ham", "spam"])
        for part in range(2)
    }
    stopped = place.run("someone/scans", "--shard-rows", "20", "--budget", "calls=25")
    assert (stopped.returncode, json.loads(stopped.stdout)["exit_code"], place.server.count) == (3, 3, 25)
    result = place.done("someone/scans", "--shard-rows", "20")

    assert place.answers.to_pylist() == [{**row, "label": judged(row["text"])} for row in given]
    assert place.answers.schema.remove_metadata() == pa.schema(
        [
            ("text", pa.string()),
            ("kind", pa.int64()),
            ("scan", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.string()),
        ]
    )
    names = ("rows", "answered", "failed", "shards", "calls", "billed_calls", "columns")
    assert [result[name] for name in names] == [50, 50, 0, 3, 50, 25, ["label"]]
    assert asked(place.server) == Counter(f"text: {text}" for text in texts(50))


def test_one_split_of_one_configuration_at_one_revision_is_answered(place: Place) -> None:
    result = place.done("someone/both:short@main", "--part", "test")
    assert place.answers["text"].to_pylist() == texts(2, 60)
    assert (result["rows"], place.server.count) == (2, 2)


READ = """
import json, sys
from preceptor.batch import open_source
from preceptor.errors import DataError
found = {}
for asked in sys.argv[1:]:
    name, part, start = asked.split()
    try:
        source = open_source(name, part=part)
        found[asked] = source.fingerprint, [row.values.get("text") for row in source.rows(int(start))]
    except DataError as error:
        found[asked] = str(error)
print(json.dumps(found))
"""


def read(place: Place, *asked: str) -> Any:
    """Return, by source, part and row to begin at, its fingerprint and the texts; or what was wrong."""
    command = [sys.executable, "-c", READ, *asked]
    ended = subprocess.run(command, env=place.environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_an_id_may_name_a_configuration_and_a_revision(place: Place, repositories: Held) -> None:
    newest = commit(repositories["someone/reviews", "main"])
    converted = commit(repositories["someone/reviews", "refs/convert/parquet"])
    both = commit(repositories["someone/both", "main"])
    assert read(
        place,
        *("someone/reviews train 0", "someone/reviews test 0", f"someone/reviews@{newest} train 0"),
        *(f"someone/reviews@{OLD} train 0", "someone/reviews@refs/convert/parquet train 0"),
        *("someone/both:long train 0", "someone/both:short@main test 0"),
    ) == {
        "someone/reviews train 0": [f"{newest} train", texts(30)],
        "someone/reviews test 0": [f"{newest} test", texts(5, 100)],
        f"someone/reviews@{newest} train 0": [f"{newest} train", texts(30)],
        f"someone/reviews@{OLD} train 0": [f"{OLD} train", texts(7)],
        "someone/reviews@refs/convert/parquet train 0": [f"{converted} train", texts(9)],
        "someone/both:long train 0": [f"{both} long train", texts(6)],
        "someone/both:short@main test 0": [f"{both} short test", texts(2, 60)],
    }


def test_what_the_hub_doesnt_have_is_told_with_what_it_has(place: Place, repositories: Held) -> None:
    repositories["someone/nothing", "main"] = {"train.csv": b"text,n\n"}
    repositories["someone/code", "main"] = {"code.py": b"raise SystemExit"}
    wrong = {
        "someone/reviews@v2 train 0": "Revision Not Found for url: ",
        "someone/reviews validation 0": "Bad split: validation. Available splits: ['train', 'test']",
        "someone/both train 0": "Please pick one among the available configs: ['long', 'short']",
        "someone/both:tall train 0": "BuilderConfig 'tall' not found. Available: ['long', 'short']",
        "someone/code train 0": "Dataset scripts are no longer supported, but found code.py",
        "someone/nothing train 0": f"someone/nothing@{commit(repositories['someone/nothing', 'main'])} has no rows.",
    }
    for asked, told in read(place, *wrong).items():
        assert wrong[asked] in told
        assert told.startswith("someone/nothing@" if "has no rows" in told else "The data set 'someone/")


def test_files_of_the_hub_are_read_from_any_row_on(place: Place, repositories: Held) -> None:
    repositories["someone/parts", "main"] = {
        "train-00000-of-00002.parquet": parquet(rows(30), group=10),
        "train-00001-of-00002.parquet": parquet(rows(20, 30), group=10),
    }
    repositories["someone/pieces", "main"] = {"train-0.jsonl": lines(rows(30)), "train-1.jsonl": lines(rows(20, 30))}
    starts = {
        f"{name} train {start}": texts(50)[start:]
        for name in ("someone/parts", "someone/pieces")
        for start in (0, 7, 10, 29, 30, 31, 45, 50)
    }
    assert {asked: found for asked, (_, found) in read(place, *starts).items()} == starts


def test_a_killed_run_goes_on_and_every_row_is_answered_once(place: Place, repositories: Held) -> None:
    held = {f"data/train-{part:05d}-of-00003.parquet": parquet(rows(100, 100 * part), group=30) for part in range(3)}
    repositories["someone/many", "main"] = held
    more = ["--shard-rows", "40", "--threads", "4"]
    with (place.folder / "told").open("w") as told:
        command = place.command("someone/many", *more)
        child = subprocess.Popen(
            command, env=place.environment, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True
        )
    while place.server.count < 110 and child.poll() is None:
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    while place.server._server._connections:  # what it had sent is still being read
        time.sleep(0.002)
    before = place.server.count
    shards = sorted(path.name for path in (place.folder / "out").iterdir())
    assert 110 <= before < 300
    assert "part-00001.parquet" in shards
    assert "part-00007.parquet" not in shards

    repositories["someone/many", "main"] = {**held, "README.md": b"Now with a description.\n"}
    assert "belongs to another input; nothing was overwritten." in place.refused("someone/many", *more)
    assert place.server.count == before

    repositories["someone/many", commit(held)] = held
    pinned = f"someone/many@{commit(held)}"
    assert f"The rows are those of {pinned}; give that name" in (place.folder / "told").read_text()
    result = place.done(pinned, *more)
    assert place.answers["text"].to_pylist() == texts(300)
    assert place.answers["label"].to_pylist() == [judged(text) for text in texts(300)]
    assert (result["rows"], result["answered"], result["shards"], result["calls"]) == (300, 300, 8, 300)
    again = asked(place.server).total() - 300
    assert set(asked(place.server)) == {f"text: {text}" for text in texts(300)}
    assert again <= 4  # in flight when it died
    assert result["billed_calls"] == place.server.count - before


def test_an_id_that_the_hub_doesnt_know_is_told_in_a_line_and_nothing_is_asked(place: Place) -> None:
    ended = place.run("someone/else")
    assert (ended.returncode, json.loads(ended.stdout)["exit_code"]) == (2, 2)
    [message] = ended.stderr.splitlines()
    assert message.startswith("Error: The data set 'someone/else' can't be had from the hub: 404 Client Error. ")
    assert f"Repository Not Found for url: {place.hub}/api/datasets/someone/else. " in message
    assert place.server.count == 0
    assert not (place.folder / "out.batch").exists()


def test_a_hub_that_is_not_there_or_never_answers_is_told_without_trying_again(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        silent = Place(place.folder, place.server, f"http://127.0.0.1:{listening.getsockname()[1]}", 1)
        ended = silent.run("someone/reviews")
    gone = silent.run("someone/reviews")
    for each, told in ((ended, "timed out"), (gone, "[Errno 111] Connection refused")):
        assert each.returncode == 2
        assert each.stderr.splitlines() == [f"Error: The data set 'someone/reviews' can't be had from the hub: {told}"]
    assert place.server.count == 0


def test_a_file_that_doesnt_fit_the_others_ends_the_batch_and_what_was_answered_stays(
    place: Place, repositories: Held
) -> None:
    repositories["someone/torn", "main"] = {
        "train-0.jsonl": lines(rows(20)),
        "train-1.jsonl": lines([{"text": "a prize", "stars": 3}]),
    }
    message = place.refused("someone/torn", "--shard-rows", "10")
    pinned = f"someone/torn@{commit(repositories['someone/torn', 'main'])}"
    assert message.startswith(f"Error: The data set '{pinned}' can't be read from row 21 on: Couldn't cast")
    assert place.answers["text"].to_pylist() == texts(20)
    assert place.server.count == 20


MEMORY = """
import os, sys
from pathlib import Path
import ctypes, pyarrow
from preceptor.batch import open_source
def resident():
    pyarrow.default_memory_pool().release_unused()  # what the allocators keep for later is no growth
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000
def read(name):
    for row in open_source(name).rows(0):
        if row.number % 1000 == 0:
            yield resident()
    yield row.number
*taken, count = read(sys.argv[1])
print(count, max(taken) - max(taken[: len(taken) // 2]))
"""


def test_memory_doesnt_grow_with_a_parquet_file_of_many_row_groups(place: Place, repositories: Held) -> None:
    drawn = random.Random(0)
    big = parquet([{"text": drawn.randbytes(2000).hex()} for _ in range(30_000)], group=300)
    repositories["someone/big", "main"] = {"train.parquet": big}
    command = [sys.executable, "-c", MEMORY, "someone/big"]
    ended = subprocess.run(command, env=place.environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    count, grown = map(int, ended.stdout.split())
    assert count == 30_000
    assert grown < 25 < len(big) // 2_000_000
