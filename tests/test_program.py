from __future__ import annotations

import asyncio
import enum
import json
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import dspy
import pytest
from dspy.utils.callback import BaseCallback

from preceptor import load
from preceptor.difference import diff
from preceptor.errors import ArtifactError
from preceptor.lm.adapter import declare
from preceptor.modules import Classify, Generate
from preceptor.program import apply, candidate_of, read, save, type_text
from preceptor.scoring.trial import Candidate
from preceptor.testing import ChatServer, asked, simulated

GOLDEN = Path(__file__).parent / "golden" / "schema1"


class Pipeline(dspy.Module):
    """A user's own program of two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.condense = dspy.Predict("text, about -> gist")
        self.judge = dspy.ChainOfThought("gist -> label")

    def forward(self, text: str, about: str) -> Any:
        return self.judge(gist=self.condense(text=text, about=about).gist)


class Noted(dspy.Signature):
    """Read the note."""

    zeta: str = dspy.InputField(desc="comes first")
    alpha: int | None = dspy.InputField()
    names: list[str] = dspy.OutputField(desc="as written")
    kind: Literal["x, y", "it's"] = dspy.OutputField()


def put(program: dspy.Module, path: Path, **settings: Any) -> None:
    save(program, path, evidence={"method": "APE"}, lm="simulated/model", **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shape(program: dspy.Module) -> dict[str, Any]:
    """Everything of a program that reaches a prompt."""
    predictors: list[tuple[str, Any]] = program.named_predictors()
    return {
        name: (
            predictor.signature.instructions,
            [
                (field, info.annotation, (info.json_schema_extra or {}).get("desc"))
                for field, info in predictor.signature.fields.items()
            ],
            [dict(demo) for demo in predictor.demos],
        )
        for name, predictor in predictors
    }


PROGRAMS: dict[str, Any] = {
    "classify": lambda: Classify("subject, body -> queue: Literal['b', 'a']", "Sort the mail.\nTwo lines."),
    "classify a bool": lambda: Classify("text -> ok: bool"),
    "generate": lambda: Generate("zeta, alpha: int -> summary: str, count: int", "Sum it up."),
    "predict": lambda: dspy.Predict(Noted),
    "chain of thought": lambda: dspy.ChainOfThought(declare("zeta, alpha -> label: Literal['b', 'a']", "Think.")),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_saved_program_is_rebuilt_field_by_field(tmp_path: Path, make: Any) -> None:
    [(name, predictor)] = make().named_predictors()
    demo = {field: f"<{field}>" for field in predictor.signature.fields}
    program = apply(make(), Candidate({name: "Better.\n\nDo “this”."}, {name: (demo,)}))

    put(program, tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert type(loaded) is type(program)
    assert shape(loaded) == shape(program)
    assert loaded._compiled is True


class Heard(BaseCallback):
    """Notes what is called, as MLflow's autolog does."""

    def __init__(self) -> None:
        self.names = list[str]()

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.names.append(type(instance).__name__)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.names.append(instance.model)


def test_a_loaded_program_is_called_awaited_batched_streamed_and_traced(tmp_path: Path) -> None:
    put(Generate("text -> summary", "Sum it up."), tmp_path / "saved")
    heard, streamify = Heard(), cast("Any", dspy.streamify)
    loaded: Any = load(tmp_path / "saved")

    async def streamed() -> list[Any]:
        return [each async for each in streamify(loaded)(text="a")]

    with ChatServer(lambda body: "One two three.") as model, dspy.context(lm=model.lm(), disable_history=True):
        with dspy.context(callbacks=[heard]):
            answers = [loaded(text="a"), asyncio.run(loaded.acall(text="a"))]
        rows = [dspy.Example(text=text).with_inputs("text") for text in ("a", "b", "c")]
        answers += loaded.batch(rows, num_threads=2, disable_progress_bar=True)
        *chunks, last = asyncio.run(streamed())
    assert [each.summary for each in [*answers, last]] == ["One two three."] * 6
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "One two three."
    assert heard.names == ["Generate", "Predict", "openai/model"] * 2


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_loaded_program_sends_the_same_request(tmp_path: Path, make: Any) -> None:
    program, lm = make(), simulated(lambda request: "{}")
    put(program, tmp_path / "saved")
    [(_, predictor)] = program.named_predictors()
    inputs = {field: f"{field} 1" for field in predictor.signature.input_fields}

    for one in (program, load(tmp_path / "saved")):
        with dspy.context(lm=lm), pytest.raises(dspy.AdapterParseError):
            one(**inputs)

    half = len(asked(lm)) // 2
    assert asked(lm)[:half] == asked(lm)[half:]


def test_a_users_own_class_is_passed_in_and_left_as_it_is(tmp_path: Path) -> None:
    program = apply(Pipeline(), Candidate({"condense": "Shorten.", "judge.predict": "Judge."}))
    put(program, tmp_path / "saved")
    student = Pipeline()

    loaded = load(tmp_path / "saved", student=student)

    assert shape(loaded) == shape(program)
    assert shape(student) == shape(Pipeline())


def test_a_users_own_class_that_isnt_passed_in_is_asked_for(tmp_path: Path) -> None:
    put(Pipeline(), tmp_path / "saved")

    with pytest.raises(ArtifactError, match=r":Pipeline; pass an instance: load\(path, student=Pipeline\(\)\)\.$"):
        load(tmp_path / "saved")


def test_a_field_type_that_no_text_can_name_asks_for_the_students_class(tmp_path: Path) -> None:
    student = Generate("photo: dspy.Image -> caption", "Look.")
    put(student, tmp_path / "saved")

    assert shape(load(tmp_path / "saved", student=student)) == shape(student)
    with pytest.raises(
        ArtifactError, match=r"has a field of a type of its own \(Unknown name: Image\); pass an instance"
    ):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            Classify("text -> ok: bool"),
            r"has the predictors \['condense', 'judge\.predict'\], the student has \['predict'\]",
        ),
        ("other inputs", r"condense was saved with the inputs \['text', 'about'\], not \['about', 'text'\]"),
        ("other outputs", r"condense was saved with the outputs \['gist'\], not \['short'\]"),
    ],
)
def test_a_student_with_other_predictors_or_fields_is_refused(tmp_path: Path, student: Any, message: str) -> None:
    put(Pipeline(), tmp_path / "saved")
    if isinstance(student, str):
        text, student = student, Pipeline()
        student.condense = dspy.Predict("about, text -> gist" if text == "other inputs" else "text, about -> short")

    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "saved", student=student)


def test_a_student_with_another_frozen_part_is_refused(tmp_path: Path) -> None:
    def made(instruction: str, *, is_frozen: bool = True) -> Pipeline:
        program = Pipeline()
        program.judge = dspy.ChainOfThought(declare("gist -> label", instruction))
        program.judge._compiled = is_frozen
        return program

    put(made("Judge."), tmp_path / "saved")

    assert list(read(tmp_path / "saved").instructions) == ["condense"]
    loaded: Any = load(tmp_path / "saved", student=made("Judge."))
    assert loaded.judge.predict.signature.instructions == "Judge."
    with pytest.raises(ArtifactError, match=r"saved: the frozen predictor judge\.predict isn't the student's; a file"):
        load(tmp_path / "saved", student=made("Judge harshly."))
    with pytest.raises(ArtifactError, match=r"the frozen predictor judge\.predict isn't"):
        load(tmp_path / "saved", student=made("Judge.", is_frozen=False))


class Mood(enum.Enum):
    GOOD = "good"


def test_a_demonstration_is_saved_as_it_is_shown(tmp_path: Path) -> None:
    student = dspy.Predict("text -> mood, tags: list[str]")
    tags = [f"t{number}" for number in range(10)]
    student.demos = [dspy.Example(text="a", mood=Mood.GOOD, tags=set(tags))]
    put(student, tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved")
    assert loaded.demos == [dspy.Example(text="a", mood="good", tags=tags)]


def test_a_probe_that_is_very_long_is_left_out(tmp_path: Path) -> None:
    probes = [{"inputs": {"text": text}, "output": "label", "answer": "a"} for text in ("short", "x" * 100_000)]
    program = Classify("text -> label: Literal['b', 'a']")
    save(program, tmp_path / "saved", evidence={"probes": probes}, lm="simulated/model")
    assert [probe["inputs"]["text"] for probe in read(tmp_path / "saved").evidence["probes"]] == ["short"]


@pytest.mark.parametrize("answer", ["cut \ud83d", json.loads(40 * "[" + 40 * "]")])
def test_a_probe_that_couldnt_be_read_again_is_left_out(tmp_path: Path, answer: Any) -> None:
    probes = [{"inputs": {"text": text}, "output": "label", "answer": text} for text in ("first", answer)]
    save(Classify("text -> label: Literal['b', 'a']"), tmp_path / "saved", evidence={"probes": probes}, lm="m")
    assert [probe["inputs"]["text"] for probe in read(tmp_path / "saved").evidence["probes"]] == ["first"]


def test_two_saves_are_equal_byte_for_byte(tmp_path: Path) -> None:
    put(Pipeline(), tmp_path / "first")
    put(Pipeline(), tmp_path / "second")

    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert sorted(files(tmp_path / "first")) == ["evidence.json", "manifest.json", "program.json"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    put(Pipeline(), tmp_path / "saved")
    before = files(tmp_path)

    with pytest.raises(
        ArtifactError, match=r"saved exists already; nothing was overwritten\. Choose another folder\.$"
    ):
        put(Classify("text -> ok: bool"), tmp_path / "saved")

    assert files(tmp_path) == before


def test_only_an_artifact_is_ever_replaced(tmp_path: Path) -> None:
    put(Pipeline(), tmp_path / "saved")
    put(Classify("text -> ok: bool", "New."), tmp_path / "saved", replace=True)
    assert read(tmp_path / "saved").instructions == {"predict": "New."}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("Years of work.", encoding="utf-8")
    with pytest.raises(ArtifactError, match="thesis exists already"):
        put(Pipeline(), tmp_path / "thesis", replace=True)
    assert files(tmp_path / "thesis") == {"chapter.txt": b"Years of work."}


def test_a_save_to_a_place_inside_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")

    with pytest.raises(ArtifactError, match=r"^Can't write the program to .*saved: (Not a directory|File exists)\.$"):
        put(Pipeline(), tmp_path / "file" / "saved")

    assert files(tmp_path) == {"file": b"x"}


def test_a_save_that_fails_half_way_leaves_the_old_artifact(tmp_path: Path) -> None:
    class Untellable:
        def __str__(self) -> str:
            raise OSError(28, "No space left on device")

    put(Pipeline(), tmp_path / "saved")
    before = files(tmp_path / "saved")

    with pytest.raises(ArtifactError, match=r"Can't write the program to .*saved: No space left on device\.$"):
        save(Pipeline(), tmp_path / "saved", evidence={"note": Untellable()}, lm="m", replace=True)

    assert files(tmp_path / "saved") == before
    assert read(tmp_path / "saved").evidence == {"method": "APE"}


def test_a_save_that_cannot_take_the_old_artifact_s_place_puts_that_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Pipeline(), tmp_path / "saved")
    before = files(tmp_path / "saved")
    rename = Path.rename

    def tidied(self: Path, target: Path) -> Path:
        if self.name == "saved":  # somebody tidies up in the meantime
            shutil.rmtree(tmp_path / ".saved.new")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", tidied)
        with pytest.raises(ArtifactError, match=r"Can't write the program to .*saved: No such file or directory\.$"):
            put(Classify("text -> ok: bool"), tmp_path / "saved", replace=True)

    assert files(tmp_path / "saved") == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_no_connection_and_no_key_is_saved(tmp_path: Path) -> None:
    student = Pipeline()
    student.set_lm(
        dspy.LM(
            "openai/gpt",
            api_key="sk-secret-1",
            api_base="https://secret-2.example",
            extra_headers={"Authorization": "Bearer secret-3"},
        )
    )

    put(student, tmp_path / "saved")

    text = b"".join(files(tmp_path / "saved").values())
    assert b"secret" not in text
    assert b"api_key" not in text
    assert b"Authorization" not in text


@pytest.mark.parametrize("name", ["program.json", "evidence.json"])
def test_an_altered_file_is_refused(tmp_path: Path, name: str) -> None:
    put(Pipeline(), tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.write_text(path.read_text(encoding="utf-8").replace("}", "} ", 1), encoding="utf-8")

    with pytest.raises(ArtifactError, match=rf"{name} was altered since it was saved \(its SHA-256 differs\)\.$"):
        load(tmp_path / "saved", student=Pipeline())


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no saved program: it has no manifest\.json\.$"):
        load(tmp_path)

    put(Pipeline(), tmp_path / "saved")
    (tmp_path / "saved" / "evidence.json").unlink()
    with pytest.raises(ArtifactError, match=r"saved is incomplete: evidence\.json is missing\.$"):
        load(tmp_path / "saved")


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    put(Pipeline(), tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").write_text("{", encoding="utf-8")

    with pytest.raises(ArtifactError, match=r"manifest\.json is no JSON: "):
        load(tmp_path / "saved")


def test_another_schema_is_refused_with_the_version_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr("preceptor.program.SCHEMA", 2)
        put(Pipeline(), tmp_path / "saved")

    with pytest.raises(
        ArtifactError, match=r"has schema 2, this preceptor reads 1; it was saved by preceptor \d+\.\d+"
    ):
        load(tmp_path / "saved")


def test_a_program_saved_under_schema_1_still_loads(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")

    loaded = load(tmp_path / "golden")

    assert isinstance(loaded, Classify)
    instructions = "Sort the mail.\nbilling: invoices \u2013 and “refunds”\nother: the rest"
    queues = Literal["billing", "it's broken", "other"]
    assert shape(loaded) == {
        "predict": (
            instructions,
            [("subject", str, "${subject}"), ("body", str, "${body}"), ("queue", queues, "${queue}")],
            [{"subject": "Invoice 7", "body": "Paid twice.", "queue": "billing"}],
        )
    }
    lm = simulated(lambda request: "it's broken")
    with dspy.context(lm=lm):
        assert loaded(subject="Door", body="It squeaks.").queue == "it's broken"
    [request] = asked(lm)
    assert [message.text for message in request.messages] == [
        "subject: Invoice 7\nbody: Paid twice.",
        "billing",
        "subject: Door\nbody: It squeaks.",
    ]


def test_the_golden_file_says_what_it_was_measured_with() -> None:
    artifact = read(GOLDEN)
    assert (artifact.program["lm"], artifact.program["module"]) == ("local/smollm2-135m@b179c9523d0e", "classify")
    assert artifact.evidence["ci"] == [0.1, 0.4]


def test_the_files_are_json_a_person_can_read(tmp_path: Path) -> None:
    put(Classify("text -> label: Literal['ä', 'b']", "Wähle."), tmp_path / "saved")

    text = (tmp_path / "saved" / "program.json").read_text(encoding="utf-8")

    assert '\n      "instructions": "Wähle.",\n' in text
    assert json.loads(text)["predictors"]["predict"]["outputs"] == {
        "label": {"type": "Literal['ä', 'b']", "description": "${label}"}
    }


def test_applying_a_candidate_leaves_the_program_and_its_class_alone() -> None:
    class Own(dspy.Signature):
        """As declared."""

        text: str = dspy.InputField()
        label: str = dspy.OutputField()

    program = dspy.Predict(Own)
    program.demos = [dspy.Example(text="hi", label="a")]

    changed = apply(program, Candidate({"self": "New."}))

    assert candidate_of(changed) == Candidate({"self": "New."})
    assert [dict(demo) for demo in dict(changed.named_predictors())["self"].demos] == [{"text": "hi", "label": "a"}]
    assert candidate_of(program) == Candidate({"self": "As declared."})
    assert Own.instructions == "As declared."


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Literal["a", 1], "Literal['a', 1]"),
        (dict[str, list[int]], "dict[str, list[int]]"),
        (int | None, "int | None"),
        (bool, "bool"),
    ],
)
def test_types_are_written_as_in_a_signature(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


def test_a_diff_shows_every_predictor_that_changed() -> None:
    before = {"a": "One.\nTwo.", "b": "Same."}
    after = {"a": "One.\n2.", "b": "Same.", "c": "New."}

    assert diff(before, after).splitlines() == [
        "--- a",
        "+++ a",
        "@@ -1,2 +1,2 @@",
        " One.",
        "-Two.",
        "+2.",
        "--- c",
        "+++ c",
        "@@ -0,0 +1 @@",
        "+New.",
    ]
    assert diff(before, before) == ""
