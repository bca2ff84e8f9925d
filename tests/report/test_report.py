"""The page of real runs: what it says, that texts stay texts, and that it asks for nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import dspy
import pytest
from dspy.lm15 import Request

from preceptor.errors import LMFailed
from preceptor.lm.embedding import Embedder
from preceptor.modules import Classify
from preceptor.report import REPORT, page, reported, write
from preceptor.teleprompters import APE, MixtureOfExperts
from preceptor.testing import prompt, simulated, system, toy

VOID: Final = {"meta", "br", "hr", "circle", "path"}
TURNED: Final = {"yes": "no", "no": "yes"}
LABELS: Final = "text -> label: Literal['<b>yes', '<b>no']"
OTHER: Final = "Answer with the opposite."


class Page(HTMLParser):
    """A page's tags and attributes, and its text without the styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def hostile(count: int, start: int = 0) -> list[dspy.Example]:
    rows = toy.rows(count, start, "row {} </td><img src=x onerror=alert(1)> <b>{}")
    return [dspy.Example(text=row.text, label=f"<b>{row.label}").with_inputs("text") for row in rows]


def answer(request: Request) -> str:
    return prompt(request).split()[-1] if toy.RIGHT in system(request) else "<b>no"


def compiled(place: Path, proposal: str, **settings: Any) -> Any:
    method = APE(
        metric="accuracy",
        lm=simulated(answer, name="task"),
        proposer=simulated(lambda request: proposal, name="writer"),
        run_dir=place,
        candidates=2,
        subsamples=1,
        **settings,
    )
    return method.compile(Classify(LABELS, toy.SEED), trainset=hostile(16), valset=hostile(24, 16))


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("replaced") / "run"
    compiled(place, f"{toy.RIGHT} <script>alert('instruction')</script> \u202eback")
    return place


def opposite(count: int, start: int = 0) -> list[dspy.Example]:
    """Rows whose label is their last word, or for tools the opposite."""
    found: list[dspy.Example] = []
    for n in range(start, start + count):
        topic, word = ("fruit", "tools")[n % 2], ("yes", "no")[n // 2 % 2]
        label = word if topic == "fruit" else TURNED[word]
        found.append(dspy.Example(text=f"{topic} {n} {word}", label=label).with_inputs("text"))
    return found


def by_topic(texts: Sequence[str]) -> list[list[float]]:
    found: list[list[float]] = []
    for text in texts:
        topic, number = f"{text} 0".split()[:2]
        near = int(number) % 3 / 10 if number.isdigit() else 0.0
        found.append({"fruit": [1.0, near, 0.0], "tools": [near, 1.0, 0.0]}.get(topic, [1.0, 1.0, 1.0]))
    return found


def ruled(request: Request) -> str:
    word = prompt(request).split()[-1]
    return word if toy.RIGHT in system(request) else TURNED[word] if OTHER in system(request) else "no"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixed") / "run"
    texts = (toy.RIGHT, OTHER)
    method = MixtureOfExperts(
        metric="accuracy",
        lm=simulated(ruled, name="task"),
        proposer=simulated(lambda request: texts[(request.config.seed or 0) % 2], name="writer"),
        run_dir=place,
        regions=2,
        embedder=Embedder("topics", by_topic),
        settings={"candidates": 6, "subsamples": 3},
    )
    program = Classify("text -> label: Literal['yes', 'no']", toy.SEED)
    method.compile(program, trainset=opposite(40), valset=opposite(64, 40))
    return place


def test_a_compile_leaves_a_report_with_the_verdict_and_all_its_parts(replaced: Path) -> None:
    shown = Page((replaced / REPORT).read_text(encoding="utf-8")).text
    assert "Replaced: +50.0 points" in shown
    assert "Replaced: accuracy 0.500 -> 1.000 on 24 rows no search step has seen (+50.0 points" in shown
    assert "Your instructions 0.500" in shown
    assert "Mended: wrong before, right after 12" in shown
    for heading in ("Score against calls", "Instructions", "Errors before and after", "Candidates", "Lineage", "Cost"):
        assert f" {heading} " in shown
    assert "It was started from Python" in shown


def test_the_report_is_a_function_of_the_files_in_the_folder(replaced: Path) -> None:
    kept = (replaced / REPORT).read_text(encoding="utf-8")
    assert page(replaced) == kept
    write(replaced, replaced.parent / "copy.html")
    assert (replaced.parent / "copy.html").read_text(encoding="utf-8") == kept


def test_the_report_is_beside_the_program_and_not_in_it(replaced: Path) -> None:
    assert sorted(path.name for path in (replaced / "program").iterdir()) == [
        *("evidence.json", "manifest.json", "program.json"),
    ]


@pytest.mark.parametrize("run", ["replaced", "mixed"])
def test_the_page_runs_no_script_and_asks_for_nothing(run: str, request: pytest.FixtureRequest) -> None:
    text = page(request.getfixturevalue(run))
    shown = Page(text)
    forbidden = {
        "script",
        "link",
        "img",
        "image",
        "iframe",
        "object",
        "embed",
        "form",
        "a",
        "use",
        "base",
        "audio",
        "video",
    }
    assert forbidden.isdisjoint(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert not any(name.startswith("on") or name in {"src", "href", "xlink:href", "srcset", "action"} for name in names)
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    [policy] = [value for name, value in shown.attributes if name == "content" and value and "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def of_demonstrations(place: Path, rule: str) -> str:
    """Return the page's text of a compile that shows two rows, to a model that obeys them or a rule."""

    def shown(request: Request) -> str:
        is_told = rule in system(request) if rule else len(request.messages) > 1
        return prompt(request).split()[-1] if is_told else "no"

    APE(
        metric="accuracy",
        lm=simulated(shown, name="task"),
        proposer=simulated(lambda request: toy.RIGHT, name="writer"),
        run_dir=place,
        candidates=1,
        few_shot=2,
    ).compile(Classify("text -> label: Literal['yes', 'no']", toy.SEED), trainset=toy.rows(16), valset=toy.rows(24, 16))
    return Page(page(place)).text


def test_the_users_words_below_which_demonstrations_won_are_what_was_compiled(tmp_path: Path) -> None:
    text = of_demonstrations(tmp_path / "run", "")
    assert "The words are yours still." in text
    assert "Below them stand 2 demonstrations from the train rows, which are part of the gain." in text
    assert f"compiled {toy.SEED} and 2 demonstrations" in text
    assert "your instructions, with the demonstrations" in text
    assert f"yours {toy.SEED}" not in text


def test_where_an_instruction_won_the_users_words_are_told_with_their_demonstrations(tmp_path: Path) -> None:
    text = of_demonstrations(tmp_path / "run", toy.RIGHT)
    assert f"compiled {toy.RIGHT} and 2 demonstrations" in text
    assert f"yours, with demonstrations {toy.SEED} and 2 demonstrations" in text


def test_what_users_and_models_wrote_is_shown_as_text(replaced: Path) -> None:
    shown = Page(page(replaced)).text
    assert "<script>alert('instruction')</script>" in shown, "an instruction"
    assert "row 16 </td><img src=x onerror=alert(1)> <b>yes" in shown, "a row"
    assert "<b>yes <b>no <b>yes" in shown, "a label, the answer before, the answer after"


def test_characters_that_cant_be_seen_are_spelt_out(replaced: Path) -> None:
    text = page(replaced)
    assert "\u202e" not in text
    assert r"\u202eback" in text


def test_the_search_the_untouched_rows_and_the_candidates_are_drawn(replaced: Path) -> None:
    shown = Page(page(replaced))
    classes = [value for name, value in shown.attributes if name == "class"]
    assert classes.count("chart") == 1
    assert classes.count("whisker") == classes.count("whisker own") == 1
    assert classes.count("range") == 2
    titled = [value for name, value in shown.attributes if name == "aria-labelledby"]
    assert titled == ["chart-1-title chart-1-desc"]
    assert "2 candidates in " in shown.text


def test_a_kept_prompt_has_a_report_that_shows_what_was_not_taken_up(tmp_path: Path) -> None:
    compiled(tmp_path / "run", "Think well.")
    shown = Page((tmp_path / "run" / REPORT).read_text(encoding="utf-8")).text
    assert "Kept: your instructions stay" in shown
    found = json.loads((tmp_path / "run" / "confirmation.json").read_text(encoding="utf-8"))
    assert (found["candidates"], len(found["rows"])) == ({}, 24), "the seed won the race"
    assert "Nothing was changed." in shown
    assert "Mended" not in shown
    assert "Wrong before and after the first 10 of 12" in shown


def test_a_run_that_failed_has_a_report_that_says_how_to_go_on(tmp_path: Path) -> None:
    def broken(request: Request) -> str:
        raise ConnectionError("no route")

    method = APE(metric="accuracy", lm=simulated(broken), run_dir=tmp_path / "run", candidates=2)
    with pytest.raises(LMFailed):
        method.compile(Classify(LABELS, toy.SEED), trainset=hostile(8), valset=hostile(8, 8))
    shown = Page((tmp_path / "run" / REPORT).read_text(encoding="utf-8")).text
    assert "Not finished: nothing has been confirmed yet" in shown
    assert "It was started from Python: compile again with the same inputs and with run_dir set to this folder" in shown
    assert "preceptor resume" not in shown
    (tmp_path / "run" / "run.json").write_text(json.dumps({"command": {"target": "text -> label"}}), encoding="utf-8")
    shown = Page(page(tmp_path / "run")).text
    assert f"go on with: preceptor resume {tmp_path / 'run'}" in shown
    assert f"preceptor compile 'text -> label' \\ --run {tmp_path / 'run'}" in " ".join(shown.split())


def test_a_run_that_is_stopped_after_it_had_a_result_keeps_its_report(replaced: Path) -> None:
    before = (replaced / REPORT).stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt), reported(replaced):
        raise KeyboardInterrupt
    assert (replaced / REPORT).stat().st_mtime_ns == before
    with reported(replaced):
        pass
    assert (replaced / REPORT).stat().st_mtime_ns > before


def test_a_report_that_cant_be_written_doesnt_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text("{oops", encoding="utf-8")
    with caplog.at_level(logging.WARNING), reported(tmp_path):
        pass
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / REPORT).mkdir()
    with caplog.at_level(logging.WARNING), reported(tmp_path):
        pass
    assert [record.message.partition(" can't be written: ")[0] for record in caplog.records] == [
        f"The report of {tmp_path}"
    ] * 2


def test_a_report_that_fails_in_a_way_nobody_foresaw_doesnt_stop_the_run(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(mixed, tmp_path / "run")
    known = json.loads((folder / "regions.json").read_text(encoding="utf-8"))
    (folder / "regions.json").write_text(json.dumps({**known, "explained": 10**400}), encoding="utf-8")

    with caplog.at_level(logging.WARNING), reported(folder):
        pass

    [record] = caplog.records
    assert (record.levelname, record.message) == ("ERROR", f"The report of {folder} can't be written")
    assert record.exc_text is not None
    assert "OverflowError: int too large to convert to float" in record.exc_text


def test_a_mixture_shows_its_regions_on_a_map_and_in_a_table(mixed: Path) -> None:
    shown = Page(page(mixed))
    assert "Map of the regions" in shown.text
    assert "region 1: 20 train rows;" in shown.text
    assert "region 1: an expert of its own" in shown.text
    assert "region 2: an expert of its own" in shown.text
    assert "Expert beside the default, rows that choose" in shown.text
    assert "Rows that chose the experts are not counted." in shown.text
    assert "region 1: predict" in shown.text
    drawn = [value or "" for name, value in shown.attributes if name == "d"]
    titled = [value for name, value in shown.attributes if name == "aria-labelledby"]
    assert "map-title map-desc" in titled
    assert sum(path.count("M") for path in drawn if path.startswith("M")) > 104, "every row, and more"


def test_a_mixture_keeps_where_its_rows_lie_and_what_each_confirmation_row_was_for(mixed: Path) -> None:
    placed = json.loads((mixed / "regions.json").read_text(encoding="utf-8"))
    told = json.loads((mixed / "confirmation.json").read_text(encoding="utf-8"))
    assert placed["regions"] == ["region 1", "region 2"]
    assert len(placed["train"]) == len(placed["members"]) == 40
    assert len(placed["confirm"]) == len(placed["routes"]) == len(told["rows"]) == 64
    assert [row["region"] for row in told["rows"]] == placed["routes"]
    assert sum(row["measures"] for row in told["rows"]) == json.loads((mixed / "result.json").read_text())["rows"]
    assert {row["after"]["score"] for row in told["rows"] if row["measures"]} == {1.0}
    assert set(told["candidates"]) == {"region 1", "region 2"}


def test_half_a_character_is_no_obstacle(replaced: Path, tmp_path: Path) -> None:
    for name in ("run.json", "result.json", "trials.jsonl", "confirmation.json"):
        text = (replaced / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace(toy.RIGHT, "Half \\ud83d."), encoding="utf-8")
    write(tmp_path, tmp_path / REPORT)
    assert r"Half \ud83d." in (tmp_path / REPORT).read_text(encoding="utf-8")
