"""`preceptor route`, and `compile --mixture`, on real files, the real embedder and the real small model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.cli import run
from preceptor.cli.command import Command
from preceptor.cli.compiling import _configured
from preceptor.cli.serving import _program
from preceptor.lm.embedding import embedder_of
from preceptor.modules import Classify, Experts
from preceptor.program import save
from preceptor.regions import divided
from preceptor.teleprompters import GEPA, MixtureOfExperts

SIGNATURE = "text -> label: Literal['yes', 'no']"
PETS = [f"My {animal} {does}." for animal in ("cat", "dog", "kitten", "puppy") for does in ("sleeps", "barks", "eats")]
TAXES = [f"The {paper} is {state}." for paper in ("tax return", "invoice", "tax bill") for state in ("due", "paid")]


def saved(folder: Path, fields: tuple[str, ...] = ("text",), *, is_plain: bool = False) -> Path:
    """Save experts whose larger region, pets, has one of its own."""
    embedder = embedder_of("all-minilm-l6-v2")
    router = divided(embedder([*PETS, *TAXES]), 2, least_rows=2, seed=0).router(embedder, fields)
    default = Classify(SIGNATURE, "Default.")
    program = default if is_plain else Experts(default, {"region 1": Classify(SIGNATURE, "For pets.")}, router)
    save(program, folder, evidence={}, lm="simulated/model")
    return folder


def test_route_says_region_expert_and_how_near_each_centroid_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(saved(tmp_path / "program"))

    assert run(["route", folder, "My puppy barks and eats.", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["region"], told["nearest"], told["expert"]) == ("region 1", "region 1", "region 1")
    first, second = told["centroids"]
    assert (first["expert"], second["expert"]) == ("region 1", "default")
    assert first["distance"] == pytest.approx(1 - first["cosine"]) == pytest.approx(told["distance"])
    assert 0 < told["distance"] < told["radius"] < second["distance"]

    assert run(["route", folder, "The invoice is due."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("region 2: default answers (nearest region 2, at distance 0.")
    assert [line.split()[:4] for line in lines[2:]] == [
        ["region", "expert", "cosine", "distance"],
        ["region", "1", "region", "1"],
        ["region", "2", "default", lines[4].split()[3]],
    ]

    assert run(["route", folder, "Quantum chromodynamics on the lattice", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["region"], told["expert"]) == ("", "default")


def test_several_fields_are_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(saved(tmp_path / "program", ("subject", "body")))

    assert run(["route", folder, "--field", "subject=My dog", "--field", "body=The dog barks.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nearest"] == "region 1"
    for given in (["text"], [], ["--field", "subject=x"], ["--field", "subject=x", "--field", "bodyx"]):
        assert run(["route", folder, *given]) == 2
        message = capsys.readouterr().err
        assert "The router looks at 2 fields: --field subject=... --field body=..." in " ".join(message.split())


def test_one_field_is_the_text_or_given_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(saved(tmp_path / "program"))
    assert run(["route", folder, "--field", "text=My cat = asleep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nearest"] == "region 1"
    assert run(["route", folder]) == 2
    assert 'The router looks at "text", as text.' in capsys.readouterr().err


def test_a_program_without_experts_has_no_routes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["route", str(saved(tmp_path / "program", is_plain=True)), "x"]) == 2
    assert "has one prompt for all inputs, and no router" in capsys.readouterr().err


def test_show_and_diff_go_expert_by_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = str(saved(tmp_path / "program")), str(saved(tmp_path / "plain", is_plain=True))

    assert run(["show", folder]) == 0
    shown = capsys.readouterr().out
    for line in (
        "router: by all-minilm-l6-v2@53aa51172d14, on text",
        "region 1: its own expert",
        "region 2: default",
        "default: predict: text: str -> label: Literal['yes', 'no']",
        "For pets.",
    ):
        assert line in shown
    assert run(["diff", plain, folder]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        "--- region 1: predict",
        "+++ region 1: predict",
        "@@ -1 +1 @@",
        "-Default.",
        "+For pets.",
    ]


def test_experts_of_another_embedder_are_used_by_giving_it(
    tmp_path: Path,
    smollm: dspy.LM,
    capsys: pytest.CaptureFixture[str],
    save_encoder: Callable[[Path, Mapping[str, Sequence[float]]], Path],
) -> None:
    words = {"cat": [1.0, 0.0], "tax": [0.0, 1.0], "fox": [1.0, 1.0]}
    encoder = save_encoder(tmp_path / "encoder", words)
    other = save_encoder(tmp_path / "other", {**words, "fox": [1.0, 0.0]})
    embedder = embedder_of(str(encoder))
    texts = ["my cat", "a cat", "the cat sleeps", "my tax", "tax is due"]
    program = Classify(SIGNATURE, "Default.")
    router = divided(embedder(texts), 2, least_rows=1, seed=0).router(embedder, ["text"])
    save(Experts(program, {}, router), tmp_path / "program", evidence={}, lm="local/smollm2-135m")
    folder, data = str(tmp_path / "program"), tmp_path / "rows.csv"
    data.write_text("text,label\nmy cat,yes\nmy tax,no\n", encoding="utf-8")
    commands = [
        ["route", folder, "a tax"],
        ["verify", folder],
        ["eval", folder, "--data", str(data)],
        ["batch", folder, str(data), str(tmp_path / "out.csv")],
    ]

    for command in commands:
        assert run(command) == 2, command
        assert "or --embedder on the command line" in " ".join(capsys.readouterr().err.split()), command
        assert run([*command, "--embedder", str(other)]) == 2, command
        assert "isn't the one the regions were made with" in " ".join(capsys.readouterr().err.split()), command
        assert run([*command, "--embedder", str(encoder)]) == 0, command
        capsys.readouterr()
    served: Any = _program(None, str(encoder), None, None, tmp_path / "program")
    assert served.router.embedder.name == embedder.name

    assert run(["route", str(saved(tmp_path / "ours")), "My cat eats.", "--embedder", str(other), "--json"]) == 0
    told = capsys.readouterr()
    assert "isn't used for" in " ".join(told.err.split())
    assert json.loads(told.out)["region"] == "region 1", "the catalogue's needs none"


def test_settings_go_to_the_mixture_or_to_the_method_it_wraps() -> None:
    knobs = {"auto": "medium", "least_rows": "30", "embedder": "some/model"}
    kind, settings = _configured(Command(target="", data="", method="gepa", mixture=4, knobs=knobs))

    assert kind is MixtureOfExperts
    assert settings == {
        "regions": 4,
        "least_rows": 30,
        "embedder": "some/model",
        "method": GEPA,
        "settings": {"auto": "medium"},
    }
    assert _configured(Command(target="", data="", method="gepa", knobs={"auto": "light"})) == (GEPA, {"auto": "light"})


def test_regions_of_constitutional_experts_are_an_option_of_its_own(
    tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"row {n},{'yes' if n % 2 else 'no'}\n" for n in range(8)))
    command = ["compile", SIGNATURE, "--data", str(rows), "--lm", "local/smollm2-135m", "--run", str(tmp_path / "run")]
    settings = ["--method", "constitutional_experts", "--set", "least_rows=1"]

    assert run([*command, *settings, "--regions", "3"]) == 2  # one constitution has no use for least_rows

    assert "A region needs least_rows >= 2, got 1." in capsys.readouterr().err


def test_a_mixture_of_any_method_is_compiled_resumed_and_shown_from_the_command_line(
    tmp_path: Path, smollm: dspy.LM, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, place = tmp_path / "rows.csv", str(tmp_path / "run")
    lines = [f"{text},{'yes' if n % 2 else 'no'}" for n, text in enumerate([*PETS, *TAXES])]
    rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    knobs = ["--set", "candidates=1", "--set", "max_tokens=12", "--set", "least_rows=2", "--mixture", "2"]
    command = ["compile", SIGNATURE, "--data", str(rows), "--lm", "local/smollm2-135m", "--run", place, *knobs]

    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "MixtureOfExperts of APE"
    assert [region["expert"] for region in result["regions"]] == 2 * ["default: too few confirmation rows"]

    assert run(["resume", place]) == 0
    out = capsys.readouterr().out
    assert "Regions\nregion    train rows  choosing rows" in out
    assert ", 0 billed now" in out
