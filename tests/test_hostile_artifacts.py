"""Artifacts as an attacker may write them: each loads cleanly or is refused in one line, and nothing of it is run."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import dspy
import numpy as np
import pydantic
import pytest

from preceptor import load
from preceptor.cli import run
from preceptor.errors import ArtifactError
from preceptor.lm.embedding import Embedder
from preceptor.lm.seam import predictors
from preceptor.modules import Classify, Experts, Generate
from preceptor.program import read, save
from preceptor.regions import PROBE, Router
from preceptor.testing import ChatServer, simulated

COPIES = 10_000
SECONDS = 1.0
FILES = ("program.json", "evidence.json")
CENTROIDS = "centroids.safetensors"


class Person(pydantic.BaseModel):
    """Somebody named in a text."""

    name: str
    ages: list[int]


class Pipeline(dspy.Module):
    """A user's own program of two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.condense = dspy.Predict("text, about -> gist")
        self.judge = dspy.ChainOfThought("gist -> label")

    def forward(self, text: str, about: str) -> Any:
        return self.judge(gist=self.condense(text=text, about=about).gist)


class People(dspy.Module):
    """A user's own program with records in records for its output."""

    def __init__(self) -> None:
        super().__init__()
        make: Any = dspy.Signature
        fields = {"text": (str, dspy.InputField()), "people": (list[Person], dspy.OutputField())}
        self.find = Generate(make(fields, "Who is named?"))

    def forward(self, text: str) -> Any:
        return self.find(text=text)


def by_length(texts: Sequence[str]) -> list[list[float]]:
    """Embed texts as angles."""
    return [[1.0, len(text) % 7 / 7] for text in texts]


EMBEDDER = Embedder("own/by length", by_length)


def experts() -> dspy.Module:
    """Two regions, of which one has an expert."""
    probe = EMBEDDER([PROBE])[0]
    router = Router(EMBEDDER, ("body",), ("region 1", "region 2"), np.eye(2, dtype=np.float32), 0.5, probe)
    first, second = (Classify("subject, body -> queue: Literal['billing', 'a']", text) for text in ("One.", "Two."))
    return Experts(first, {"region 2": second}, router)


@dataclass(frozen=True)
class Original:
    make: Callable[[], dspy.Module]
    is_own_class: bool = False


ORIGINALS: dict[str, Original] = {
    "classify": Original(lambda: Classify("subject, body -> queue: Literal['billing', \"it's\"]", "Sort the mail.")),
    "generate": Original(lambda: Generate("zeta, alpha: int | None -> parts: Sequence[str], counts: dict[str, int]")),
    "predict": Original(lambda: dspy.Predict("question -> answer: float")),
    "think": Original(lambda: dspy.ChainOfThought("question -> answer")),
    "pipeline": Original(Pipeline, is_own_class=True),
    "people": Original(People, is_own_class=True),
    "experts": Original(experts),
}

EVIDENCE: dict[str, Any] = {
    "method": "APE",
    "metric": "accuracy",
    "baseline": 0.5,
    "baseline_ci": [0.4, 0.6],
    "compiled": 0.75,
    "compiled_ci": [0.6, 0.9],
    "gain": 0.25,
    "ci": [0.1, 0.4],
    "p_value": 0.01,
    "replaced": True,
    "rows": 40,
    "search_score": 0.8,
    "calls": 120,
    "tokens": 4000,
    "dollars": 0.0,
    "instructions": {"predict": "Better."},
    "seed_instructions": {"predict": "Sort the mail."},
    "verdict": "Replaced: accuracy 0.500 -> 0.750.",
    "probes": [{"inputs": {"subject": "Invoice", "body": "Paid twice."}, "answer": "billing"}],
}

Raw: TypeAlias = tuple[str]
"""JSON text that `json.dumps` would never write, in a tuple to tell it from a string."""

RAW: list[Raw] = [
    *(("1e999",), ("-1e999",), ("NaN",), ("Infinity",), ("1" * 5000,), ("9" * 4000,), ("1e-999",), ("-0",), ("01",)),
    *(
        ("[" * 100_000 + "]" * 100_000,),
        ("[" * 100_000,),
        ('{"a":' * 50_000 + "1" + "}" * 50_000,),
        ("[" * 40 + "]" * 40,),
    ),
    *(('"\\ud800"',), ('"\\udfff\\ud800"',), ('{"\\ud800": 1}',), ("tru",), ("",), ('"\t"',), ('{"a": 1, "a": 2}',)),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**63, -(10**30), "", "x", "\x00", "\x1b[2J", "[/red]", "[link=http://x]y[/]"),
    *("../../etc/passwd", "/etc/passwd", "a" * 100_000, "\n" * 100_000, "{0.__class__}", "${HOME}", "%s%n", "\u202e"),
    *([], {}, [[]], {"": ""}, ["a"], [{}], {"__class__": "os.system"}, {"base": {"x": 1}}, [None] * 1000),
]
TYPES: list[str] = [
    *("__import__('os').system('touch PWNED')", "os.system", "hostile_sentinel", "hostile_sentinel.run", "antigravity"),
    *("dspy.LM", "dspy.Image", "dspy.Code['python']", "preceptor.lm.local.LocalEngine", "pathlib.Path", "type", "Self"),
    *("list[" * 1000 + "int" + "]" * 1000, "list[" * 20 + "int" + "]" * 20, "int|" * 5000 + "int", "-" * 100_000 + "1"),
    *(
        "(" * 100_000,
        "Literal[" + "'x'," * 20_000 + "'y']",
        f"Literal[{', '.join(map(str, range(20_000)))}]",
        "Literal[]",
    ),
    *("Literal['\\ud800']", "Literal['\\x1b[2J']", "Literal[1, True, None, 'True']", "Literal[" + "9" * 5000 + "]"),
    *(
        "Field(default_factory=os.getcwd)",
        "lambda: 0",
        "str; import os",
        "str, config: dict",
        "str -> b: str",
        "str = 1",
    ),
    *("ForwardRef('x')", "typing.ForwardRef('os.system(1)')", "Annotated[str, 1]", "Callable[[int], str]", "Type[int]"),
    *(
        "os.environ['HOME']",
        "sys.modules",
        "tuple[()]",
        "tuple[int, ...]",
        "tuple[...]",
        "str\x00",
        "'str'",
        "1",
        "...",
    ),
    *("None", "Any", "set[dict[str, list[int]]]", "dict[list[int], int]", "frozenset[set[int]]", "complex", "bytes"),
    *(
        "Optional[int]",
        "Union[int, str, None]",
        "Union[None]",
        "Sequence[Mapping[str, float]]",
        "Iterable[int]",
        "dict",
    ),
    *("Literal['" + "x" * 500_000 + "']", "Literal['" + "\\\\" * 200_000 + "']", "str " * 100_000, "|" * 1000, "[" * 9),
]
NAMES: list[str] = [
    *("__class__", "__init__", "__doc__", "__base__", "_private", "model_config", "model_fields", "model_dump", "self"),
    *("cls", "config", "lm", "demos", "signature", "new_signature", "instructions", "fields", "input_fields", "base"),
    *("", "..", "../x", "/etc/passwd", "a\x00b", "a b", "a: int, b", "class", "é", "x" * 10_000, "completions", "1a"),
    *("reasoning", "answer", "schema", "copy", "json", "program.json", "__import__", "predict", "\ud800", "\x1b[2J"),
]
MODULES: list[str] = [
    *("os:system", "os.system", "subprocess:Popen", "hostile_sentinel:run", "__main__:x", "../../x", "", "[red]", "/"),
    *("dspy.LM", "dspy.ProgramOfThought", "dspy.CodeAct", "dspy.PythonInterpreter", "dspy.ReAct", "dspy:Predict"),
    *(
        "classify",
        "generate",
        "dspy.Predict",
        "dspy.ChainOfThought",
        "preceptor.modules:Classify",
        "a" * 10_000,
        "\x1b",
    ),
]
MODELS: list[str] = [
    "huggingface/https://evil.example",
    "local/../../x",
    "",
    "\x1b[2J",
    "openai/",
    "[/x]",
    "a" * 10_000,
]


@dataclass
class Place:
    """Something in a file's place that is no plain file; made by a function of its path."""

    make: Callable[[Path], object]


@dataclass
class Copy:
    """A copy of an artifact on its way to disk."""

    files: dict[str, bytes | Place]
    elsewhere: Path
    is_signed: bool = True
    extra: list[str] = field(default_factory=list[str])

    def tree(self, name: str) -> Any:
        content = self.files[name]
        assert isinstance(content, bytes)
        return json.loads(content)

    def put(self, folder: Path) -> None:
        if self.is_signed:
            contents = {name: self.files.get(name) for name in (*FILES, CENTROIDS)}
            hashes = {name: hashlib.sha256(c).hexdigest() for name, c in contents.items() if isinstance(c, bytes)}
            self.files["manifest.json"] = json.dumps(hashes).encode()
        for name, content in self.files.items():
            if isinstance(content, Place):
                content.make(folder / name)
            else:
                (folder / name).write_bytes(content)


Mutation = Callable[[random.Random, Copy], None]


def written(value: Any) -> str:
    """JSON, but for tuples, whose only element is written as it is, and lists of pairs that are duplicated names."""
    if isinstance(value, tuple):
        return str(value[0])
    if isinstance(value, Twice):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(inner)}" for name, inner in value.pairs) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


@dataclass
class Twice:
    pairs: list[tuple[str, Any]]


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as its holder and its key there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner):
        yield value, key
        yield from spots(each)


def in_tree(change: Callable[[random.Random, Any, Any], None], *, where: str = "") -> Mutation:
    """A mutation of one place in a file's JSON; `where` restricts it to keys of that name."""

    def mutate(rng: random.Random, copy: Copy) -> None:
        name = "program.json" if where or rng.random() < 0.75 else "evidence.json"
        tree = copy.tree(name)
        places = [(holder, key) for holder, key in spots(tree) if not where or key == where]
        for holder, key in rng.sample(places, 1 if where or rng.random() < 0.8 else 2):
            with contextlib.suppress(KeyError, IndexError):  # the first may have taken the second away
                change(rng, holder, key)
        copy.files[name] = written(tree).encode("utf-8", "surrogatepass")

    return mutate


def one_of(pool: list[Any]) -> Callable[[random.Random, Any, Any], None]:
    def change(rng: random.Random, holder: Any, key: Any) -> None:
        holder[key] = rng.choice(pool)

    return change


def removed(rng: random.Random, holder: Any, key: Any) -> None:
    del holder[key]


def renamed(rng: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        pairs = [(rng.choice(NAMES) if name == key else name, value) for name, value in holder.items()]
        holder.clear()
        holder.update(pairs)


def swapped(rng: random.Random, holder: Any, key: Any) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def with_one_twice(rng: random.Random, value: dict[str, Any]) -> Twice:
    again = rng.choice([*value.items(), (next(iter(value)), rng.choice(VALUES))])
    return Twice([*value.items(), again])


def doubled(rng: random.Random, copy: Copy) -> None:
    name = rng.choice(FILES)
    tree = copy.tree(name)
    places = [(h, k) for h, k in spots(tree) if isinstance(h[k], dict) and h[k]]
    if places and rng.random() < 0.8:
        holder, key = rng.choice(places)
        holder[key] = with_one_twice(rng, holder[key])
    else:
        tree = with_one_twice(rng, tree)
    copy.files[name] = written(tree).encode()


def wrapped(rng: random.Random, holder: Any, key: Any) -> None:
    for _ in range(rng.choice([1, 5, 31, 40])):
        holder[key] = rng.choice([[holder[key]], {"inner": holder[key]}])


def multiplied(rng: random.Random, holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, list):
        holder[key] = value * rng.choice([2, 500, 12_000])
    elif isinstance(value, dict):
        holder[key] = {
            **value,
            **{f"{name}{n}": each for name, each in value.items() for n in range(rng.choice([1, 400]))},
        }
    elif isinstance(value, str):
        holder[key] = value * rng.choice([2, 1000, 100_000])


def bytes_of(rng: random.Random, copy: Copy) -> tuple[str, bytearray]:
    name = rng.choice((*FILES, FILES[0]))
    content = copy.files[name]
    assert isinstance(content, bytes)
    return name, bytearray(content)


def bits_flipped(rng: random.Random, copy: Copy) -> None:
    name, content = bytes_of(rng, copy)
    for _ in range(rng.choice([1, 1, 3, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    copy.files[name] = bytes(content)


def bytes_cut(rng: random.Random, copy: Copy) -> None:
    name, content = bytes_of(rng, copy)
    start = rng.randrange(len(content))
    del content[start : rng.choice([start + 1, start + 20, len(content)])]
    copy.files[name] = bytes(content)


def bytes_inserted(rng: random.Random, copy: Copy) -> None:
    name, content = bytes_of(rng, copy)
    foreign = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"}", b'"', b"\\u", b",", rng.randbytes(30)]
    at = rng.choice([0, len(content), rng.randrange(len(content))])
    content[at:at] = rng.choice(foreign)
    copy.files[name] = bytes(content)


def recoded(rng: random.Random, copy: Copy) -> None:
    name, content = bytes_of(rng, copy)
    text = content.decode()
    copy.files[name] = text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"]))


def whole_replaced(rng: random.Random, copy: Copy) -> None:
    wholes = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"1",
        b'"x"',
        b"\x80\x04N.",
        b"PK\x03\x04",
        b"SQLite format 3\x00",
        b"[" * 10**5,
    ]
    copy.files[rng.choice(FILES)] = rng.choice(wholes)


def manifest_changed(rng: random.Random, copy: Copy) -> None:
    copy.is_signed = False
    good = copy.tree("manifest.json")
    first = good["program.json"]
    bad: list[Any] = [
        *({}, [], None, "x", 1, {**good, "program.json": first.upper()}, {**good, "program.json": first[:-1] + "0"}),
        *({**good, "program.json": None}, {**good, "program.json": [first]}, {"program.json": first}, {**good, "x": 1}),
        *({**good, "../../etc/passwd": "0" * 64}, {**good, "/etc/passwd": "0" * 64}, {**good, "a\x00b": "0" * 64}),
        *({name.upper(): value for name, value in good.items()}, {**good, "program.json": 10**400}, [good]),
    ]
    whole = json.dumps(rng.choice(bad)).encode()
    cut = rng.random() < 0.2
    copy.files["manifest.json"] = rng.choice([b"", b"\xff", b"[" * 10**5, b"{" * 10**5, whole[1:]]) if cut else whole


def unsigned(rng: random.Random, copy: Copy) -> None:
    bits_flipped(rng, copy)
    copy.is_signed = False


def missing(rng: random.Random, copy: Copy) -> None:
    copy.is_signed = False
    del copy.files[rng.choice((*FILES, "manifest.json"))]


def files_swapped(rng: random.Random, copy: Copy) -> None:
    one, other = rng.sample((*FILES, "manifest.json"), 2)
    copy.is_signed = "manifest.json" not in (one, other)
    copy.files[one], copy.files[other] = copy.files[other], copy.files[one]


def extra_files(rng: random.Random, copy: Copy) -> None:
    for name in ("__init__.py", "sitecustomize.py", "program.pkl", ".env", "hostile_sentinel.py"):
        copy.files[name] = b"open('PWNED', 'w')"
    copy.files["loop"] = Place(lambda path: path.symlink_to(path))


def no_plain_file(rng: random.Random, copy: Copy) -> None:
    name = rng.choice((*FILES, "manifest.json"))
    content = copy.files[name]
    assert isinstance(content, bytes)

    def linked(path: Path) -> None:
        (copy.elsewhere / "target").write_bytes(content)
        path.symlink_to(copy.elsewhere / "target")

    def hard_linked(path: Path) -> None:
        target = copy.elsewhere / f"hard{time.time_ns()}"
        target.write_bytes(content)
        path.hardlink_to(target)

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(10**9)

    def bound(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):  # its name may be too long
            server.bind(str(path))

    def device(path: Path) -> None:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:  # only root makes devices
            path.symlink_to("/dev/zero")

    def filled(path: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(content)

    kinds: list[Callable[[Path], object]] = [
        *(linked, hard_linked, sparse, bound, device, filled, os.mkfifo, Path.mkdir),
        *(lambda path, to=to: path.symlink_to(to) for to in ("/etc/passwd", "/", name, "../nowhere", "program.json")),
    ]
    copy.is_signed = copy.is_signed and name != "manifest.json"
    copy.files[name] = Place(rng.choice(kinds))


def tensors_changed(rng: random.Random, copy: Copy) -> None:
    """Put other bytes in the place of the centroids, where there are any; else put a file there."""
    content = copy.files.get(CENTROIDS, b"")
    assert isinstance(content, bytes)
    size = int.from_bytes(content[:8], "little")
    header, numbers = content[8 : 8 + size], bytearray(content[8 + size :])
    for at in rng.sample(range(len(numbers)), min(len(numbers), 4)):
        numbers[at] = rng.choice([0x00, 0x7F, 0x80, 0xFF])
    shapes = [b"[2,2]", b"[4]", b"[2,0]", b"[2000000000,2]", b"[-1,2]", b"[2,2,1]", b"[]", b"null"]
    kinds = [b'"F64"', b'"BF16"', b'"F8_E4M3"', b'"I32"', b'"U8"', b'"X"', b"1"]
    headers = [
        header.replace(b"[2,2]", rng.choice(shapes)),
        header.replace(b'"F32"', rng.choice(kinds)),
        header.replace(b"[2]", rng.choice(shapes)),
        header.replace(b"centroids", rng.choice([b"probe", b"__metadata__", b"\x1b[2J", b"x" * 1000])),
        b'{"__metadata__": {"a": "b"}}',
        b"{" * 10_000,
        b"null",
    ]
    lied = rng.choice(headers)
    sizes = [len(lied), len(lied) + 1, 0, 2**63, 2**64 - 1, 10**8]
    wholes = [
        content[:8] + header + bytes(numbers),
        rng.choice(sizes).to_bytes(8, "little") + lied + bytes(numbers),
        content[: rng.randrange(len(content) + 1)],
        content + b"\x00",
        b"\x80\x04N.",
        b"",
    ]
    copy.files[CENTROIDS] = rng.choice(wholes)


def steering_probe(rng: random.Random, copy: Copy) -> None:
    tree = copy.tree("evidence.json")
    tree["probes"][0]["inputs"][rng.choice(NAMES[9:19])] = rng.choice(
        [{"api_base": "http://127.0.0.1:9/v1"}, "hostile_sentinel -> x: hostile_sentinel", "openai/x", [], "x"]
    )
    copy.files["evidence.json"] = written(tree).encode()


MUTATIONS: dict[str, Mutation] = {
    "bits flipped": bits_flipped,
    "bytes cut": bytes_cut,
    "bytes inserted": bytes_inserted,
    "another encoding": recoded,
    "another file": whole_replaced,
    "field removed": in_tree(removed),
    "field renamed": in_tree(renamed),
    "field retyped": in_tree(one_of(VALUES)),
    "field of impossible JSON": in_tree(one_of(RAW)),
    "field doubled": doubled,
    "fields swapped": in_tree(swapped),
    "field wrapped": in_tree(wrapped),
    "field multiplied": in_tree(multiplied),
    "type": in_tree(one_of(TYPES), where="type"),
    "module": in_tree(one_of(MODULES), where="module"),
    "model": in_tree(one_of(MODELS), where="lm"),
    "input renamed": in_tree(
        lambda rng, holder, key: renamed(rng, holder[key], next(iter(holder[key]))), where="inputs"
    ),
    "output renamed": in_tree(
        lambda rng, holder, key: renamed(rng, holder[key], next(iter(holder[key]))), where="outputs"
    ),
    "instructions": in_tree(one_of(VALUES), where="instructions"),
    "demonstrations": in_tree(lambda rng, holder, key: one_of(VALUES)(rng, holder[key], 0), where="demos"),
    "steering probe": steering_probe,
    "centroids": tensors_changed,
    "manifest": manifest_changed,
    "not signed": unsigned,
    "file missing": missing,
    "files swapped": files_swapped,
    "files added": extra_files,
    "no plain file": no_plain_file,
}


class Watch:
    """Notes what a process does that reading a file never needs, while it is on."""

    FORBIDDEN = frozenset(
        {"compile", "exec", "import", "marshal.loads", "pickle.find_class", "webbrowser.open", "code.__new__"}
        | {f"os.{name}" for name in ("system", "exec", "fork", "forkpty", "posix_spawn", "spawn", "startfile", "kill")}
        | {f"os.{name}" for name in ("chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink")}
        | {f"os.{name}" for name in ("truncate", "putenv", "unsetenv", "utime", "setxattr", "removexattr")}
        | {"subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"}
        | {"ctypes.dlopen", "ctypes.cdata", "ctypes.call_function", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
    )

    def __init__(self) -> None:
        self.is_on = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            mode, flags = str(arguments[1] or ""), int(arguments[2] or 0)
            if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen[f"write {arguments[0]}"] += 1
        elif event in self.FORBIDDEN:
            self.seen[f"{event} {str(arguments)[:200]}"] += 1

    @contextlib.contextmanager
    def on(self) -> Generator[None]:
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of copies are written."""
    memory = Path("/dev/shm")
    folder = memory / f"preceptor-{os.getpid()}-{time.time_ns()}" if os.access(memory, os.W_OK) else tmp_path / "copies"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each saved original."""
    saved: dict[str, dict[str, bytes]] = {}
    for name, original in ORIGINALS.items():
        program, folder = original.make(), tmp_path_factory.mktemp("original") / "saved"
        for _, predictor in predictors(program):
            demo = {field: f"<{field}>" for field in predictor.signature.fields}
            predictor.demos = [dspy.Example(demo), dspy.Example({**demo, "note": [1, {"é": None}]})]
        save(program, folder, evidence=EVIDENCE, lm="simulated/model")
        saved[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return saved


def answered(program: dspy.Module) -> str:
    """Ask a loaded program once; say whether its answer could be parsed."""
    own: dict[type, list[str]] = {Pipeline: ["text", "about"], People: ["text"]}
    inputs = own.get(type(program), list(predictors(program)[0][1].signature.input_fields))
    try:
        with dspy.context(lm=simulated(lambda request: "billing"), disable_history=True):
            program(**dict.fromkeys(inputs, "x"))
    except dspy.AdapterParseError:
        return "loads; the answer isn't of its type"
    return "loads and answers"


def outcome(folder: Path, student: dspy.Module | None) -> str:
    try:
        program = load(folder, student=student, embedder=EMBEDDER)
    except ArtifactError as error:
        message = str(error)
        assert str(folder) in message
        assert message.isprintable(), "one line"
        assert len(message) < 700
        return "refused"
    return answered(program)


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Pydantic and DSPy remark on odd names and inputs."""
    monkeypatch.setattr(logging.getLogger("dspy"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("dspy.predict.predict"), "disabled", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.usefixtures("_quiet")
def test_ten_thousand_mutated_copies_load_cleanly_or_are_refused_and_run_nothing(
    place: Path, originals: Mapping[str, dict[str, bytes]], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = place / "import"
    sentinel.mkdir()
    (sentinel / "hostile_sentinel.py").write_text(f"open({str(place / 'PWNED')!r}, 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(sentinel)
    monkeypatch.chdir(place)
    for name, files in originals.items():  # what is imported on first use is none of the artifact's doing
        Copy(dict(files), place).put(folder := _made(place / name))
        assert outcome(folder, _student(name)) in ("loads and answers", "loads; the answer isn't of its type")

    gc.collect()
    gc.freeze()  # going through what other tests left is none of its doing either
    told: Counter[tuple[str, str]] = Counter()
    slowest: tuple[float, str] = (0.0, "")
    for number in range(COPIES):
        kind = list(MUTATIONS)[number % len(MUTATIONS)]
        rng = random.Random(f"{kind} {number}")
        name = rng.choice(list(originals))
        copy, folder = Copy(dict(originals[name]), place), _made(place / "copy")
        MUTATIONS[kind](rng, copy)
        copy.put(folder)
        student, start = _student(name), time.thread_time()
        try:
            with watch.on():
                told[kind, outcome(folder, student)] += 1
        except Exception as error:  # noqa: BLE001  named with the copy
            pytest.fail(f"{kind}, copy {number} of {name}: {type(error).__name__}: {str(error)[:500]}")
        slowest = max(slowest, (time.thread_time() - start, f"{kind}, copy {number} of {name}"))
        shutil.rmtree(folder)

    gc.unfreeze()
    assert watch.seen == Counter()
    assert not (place / "PWNED").exists()
    assert slowest < (SECONDS, "")
    assert sum(told.values()) == COPIES
    assert {kind for kind, how in told if how == "refused"} == set(MUTATIONS) - {"files added"}
    assert {kind for kind, how in told if how != "refused"} >= {"instructions", "type", "files added", "demonstrations"}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _student(name: str) -> dspy.Module | None:
    return ORIGINALS[name].make() if ORIGINALS[name].is_own_class else None


def signed(folder: Path, files: Mapping[str, bytes], **changed: Any) -> Path:
    """Put a copy whose `program.json` or `evidence.json` is changed by a function of its tree, with fitting hashes."""
    copy = Copy(dict(files), folder)
    for name, change in changed.items():
        tree = copy.tree(f"{name}.json")
        change(tree)
        copy.files[f"{name}.json"] = written(tree).encode()
    copy.put(_made(folder))
    return folder


def test_a_type_that_names_a_module_is_refused_and_the_module_is_not_imported(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_sentinel.py").write_text("open('PWNED', 'w')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = signed(
        tmp_path / "saved",
        originals["predict"],
        program=lambda tree: tree["predictors"]["self"]["inputs"]["question"].update(type="hostile_sentinel"),
    )

    with pytest.raises(ArtifactError, match=r"type of its own \(Unknown name: hostile_sentinel\); pass an instance"):
        load(folder)

    assert "hostile_sentinel" not in sys.modules
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["config", "signature", "lm", "demos"])
def test_a_probe_that_would_steer_the_call_to_another_server_is_refused(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]], name: str
) -> None:
    def steer(tree: Any) -> None:
        tree["probes"][0]["inputs"][name] = {"api_base": "http://127.0.0.1:9/v1"}

    folder = signed(tmp_path / "saved", originals["predict"], evidence=steer)

    with pytest.raises(
        ArtifactError, match=rf"evidence\.json is malformed: a probe has the input '{name}', which would"
    ):
        read(folder)


def test_a_model_at_an_address_is_neither_saved_nor_taken_from_a_file(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]]
) -> None:
    save(dspy.Predict("a -> b"), tmp_path / "own", evidence={}, lm="huggingface/https://user:pass@models.example/x")
    assert read(tmp_path / "own").program["lm"] == "huggingface/"

    folder = signed(
        tmp_path / "saved", originals["predict"], program=lambda tree: tree.update(lm="huggingface/http://evil.example")
    )
    with pytest.raises(ArtifactError, match=r"program\.json is malformed: lm holds an address; only the name"):
        read(folder)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["a"], r"malformed: frozen must be an object"),
        ({"a": 1}, r"malformed: the digest of a frozen predictor must be a text"),
        ({"\x1b[2J": "0"}, r"malformed: the name of a frozen predictor"),
    ],
)
def test_what_is_said_of_frozen_parts_is_checked(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]], frozen: Any, message: str
) -> None:
    folder = signed(tmp_path / "saved", originals["predict"], program=lambda tree: tree.update(frozen=frozen))
    with pytest.raises(ArtifactError, match=message):
        read(folder)


def test_a_link_is_not_followed_even_to_a_file_that_fits_and_a_hard_link_is_a_file(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]]
) -> None:
    folder = signed(tmp_path / "saved", originals["classify"])
    (folder / "program.json").rename(tmp_path / "elsewhere")
    (folder / "program.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"program\.json is a symbolic link, which isn't followed; copy the folder"):
        load(folder)

    (folder / "program.json").unlink()
    (folder / "program.json").hardlink_to(tmp_path / "elsewhere")
    assert isinstance(load(folder), Classify)


def test_a_link_to_the_whole_folder_is_followed_for_it_is_the_callers(
    tmp_path: Path, originals: Mapping[str, dict[str, bytes]]
) -> None:
    signed(tmp_path / "saved", originals["classify"])
    (tmp_path / "latest").symlink_to(tmp_path / "saved")
    assert isinstance(load(tmp_path / "latest"), Classify)


@pytest.mark.parametrize("name", ["a\x00b", "", "x" * 300])
def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path / name)


@pytest.mark.usefixtures("_quiet")
def test_the_command_line_ends_with_an_exit_code_on_each_and_never_steers_the_terminal(
    place: Path,
    originals: Mapping[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    told: Counter[tuple[str, int]] = Counter()
    with ChatServer(lambda body: "billing") as server:
        for number in range(10 * len(MUTATIONS)):
            kind = list(MUTATIONS)[number % len(MUTATIONS)]
            rng = random.Random(f"command line {kind} {number}")
            name = rng.choice(list(originals))
            copy, folder = Copy(dict(originals[name]), place), _made(place / "copy")
            MUTATIONS[kind](rng, copy)
            copy.put(folder)
            for command in (
                ["show", str(folder)],
                ["show", str(folder), "--json"],
                ["diff", str(folder), str(folder)],
                ["route", str(folder), "x"],
                ["verify", str(folder), "--lm", "openai/model", "--api-base", server.url],
            ):
                try:
                    told[command[0], run(command)] += 1
                except Exception as error:  # noqa: BLE001  named with the copy
                    pytest.fail(
                        f"{command[0]}, {kind}, copy {number} of {name}: {type(error).__name__}: {error!s:.300}"
                    )
            shown = "".join(capsys.readouterr())
            assert "\x1b" not in shown, f"{kind}, copy {number} of {name}"
            shutil.rmtree(folder)

    assert {code for _, code in told} == {0, 2}
    assert min(told["show", 0], told["diff", 0], told["verify", 0]) > 0


HUGE = """
import resource, sys, time
from pathlib import Path
from preceptor import load
from preceptor.cli import run
from preceptor.errors import ArtifactError
import preceptor.modules

[used] = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")]
resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + 400_000_000,) * 2)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    start = time.thread_time()
    try:
        load(folder)
        how = "loads"
    except ArtifactError as error:
        how = str(error).removeprefix(f"{folder}").replace("\\n", " ")
    print(folder.name, round(time.thread_time() - start, 2), how, sep="\\t")
"""


def test_huge_copies_take_a_second_and_four_hundred_megabytes_at_most(
    place: Path, originals: Mapping[str, dict[str, bytes]]
) -> None:
    files = originals["classify"]

    def with_predictor(**changed: Any) -> Callable[[Any], None]:
        return lambda tree: tree["predictors"]["predict"].update(changed)

    def with_labels(count: int) -> Callable[[Any], None]:
        labels = ", ".join(f"'label {n}'" for n in range(count))
        return with_predictor(outputs={"queue": {"type": f"Literal[{labels}]", "description": ""}})

    changes: dict[str, Callable[[Any], None]] = {
        "brackets": with_predictor(demos=("[" * 100_000 + "]" * 100_000,)),
        "demos": with_predictor(demos=[{}] * 300_000),
        "fields": with_predictor(inputs={f"f{n}": {"type": "str", "description": ""} for n in range(50_000)}),
        "labels": with_labels(60_000),
        "lists": lambda tree: tree.update(more=("[" + "[]," * 5_000_000 + "0]",)),
        "long instructions": with_predictor(instructions="a\n" * 2_000_000),
        "most instructions": with_predictor(instructions="a\n" * 500_000),
        "most labels": with_labels(10_000),
        "one text": with_predictor(instructions="\U0001f600" * 3_000_000),
        "numbers": lambda tree: tree.update(more=("[" + ("9" * 4000 + ",") * 3000 + "0]",)),
        "same names": lambda tree: tree.update(more=Twice([("a", 1)] * 200_000)),
    }
    for name, change in changes.items():
        signed(place / name, files, program=change)
    sparse = signed(place / "sparse", files)
    os.truncate(sparse / "evidence.json", 10**9)

    one_text = (place / "one text" / "program.json").stat().st_size
    command = [sys.executable, "-c", HUGE, str(place)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert told.returncode == 0, told.stderr[-2000:]
    lines = [line.split("\t") for line in told.stdout.splitlines()]
    assert {name: how for name, _, how in lines} == {
        "brackets": "/program.json is nested deeper than 32 levels.",
        "demos": "/program.json is malformed: predictor predict.demos: 300,000 of them, more than 10,000.",
        "fields": "/program.json is malformed: predictor predict.inputs: 50,000 of them, more than 1,000.",
        "labels": " has a field of a type of its own (A type of more than 10,000 labels); "
        "pass an instance: load(path, student=...).",
        "lists": "/program.json holds more than 1,000,000 values.",
        "long instructions": "/program.json is malformed: predictor predict has instructions of 4,000,000 characters, "
        "more than 1,000,000.",
        "most instructions": "loads",
        "most labels": "loads",
        "numbers": "loads",
        "one text": f"/program.json has {one_text:,} bytes, more than 16,000,000.",
        "same names": "/program.json names 'a' twice.",
        "sparse": "/evidence.json has 1,000,000,000 bytes, more than 16,000,000.",
    }
    assert {name: seconds for name, seconds, _ in lines if float(seconds) > SECONDS} == {}
