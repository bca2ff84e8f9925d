"""Experts in an artifact: saved, loaded and compared expert by expert, and refused where a number doesn't fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from safetensors.numpy import save as tensors_of

from preceptor import load
from preceptor.difference import compared
from preceptor.errors import ArtifactError
from preceptor.lm.embedding import Embedder, embedder_of
from preceptor.modules import Classify, Experts
from preceptor.program import read, save
from preceptor.regions import Router
from preceptor.testing import simulated

SIGNATURE = "text -> label: Literal['yes', 'no']"
CENTROIDS = "centroids.safetensors"


def embed(texts: Sequence[str]) -> list[list[float]]:
    return [[1.0, 0.0] if "fruit" in text else [0.0, 1.0] if "tool" in text else [1.0, 1.0] for text in texts]


TOPICS = Embedder("topics", embed)


def router(embedder: Embedder = TOPICS) -> Router:
    probe = np.array([0.5**0.5, 0.5**0.5], dtype=np.float32)
    return Router(embedder, ("text",), ("region 1", "region 2"), np.eye(2, dtype=np.float32), 0.1, probe)


def experts(text: str = "For tools.", made: Router | None = None) -> Experts:
    program = Experts(Classify(SIGNATURE, "Default."), {"region 2": Classify(SIGNATURE, text)}, made or router())
    own: Any = program.experts["region 2"]
    own.predict.demos = [dspy.Example(text="a tool", label="no")]
    return program


def put(program: dspy.Module, folder: Path) -> Path:
    save(program, folder, evidence={}, lm="simulated/model")
    return folder


class Own(dspy.Module):
    """A class of the user's."""

    def __init__(self, instructions: str = "Default.") -> None:
        super().__init__()
        self.judge = Classify(SIGNATURE, instructions)

    def forward(self, text: str) -> Any:
        return self.judge(text=text)


@pytest.mark.parametrize("is_own_class", [False, True], ids=["ours", "the user's class"])
def test_a_saved_program_of_experts_answers_and_routes_as_before(tmp_path: Path, is_own_class: bool) -> None:
    program = Experts(Own(), {"region 2": Own("For tools.")}, router()) if is_own_class else experts()

    loaded: Any = load(
        put(program, tmp_path / "saved"), student=Own("Other.") if is_own_class else None, embedder=TOPICS
    )

    assert type(loaded) is Experts
    assert loaded.dump_state() == program.dump_state()
    assert loaded.router.centroids.tobytes() == program.router.centroids.tobytes()
    told = ("fields", "names", "radius")
    assert [getattr(loaded.router, name) for name in told] == [getattr(program.router, name) for name in told]
    with dspy.context(lm=simulated(lambda request: "yes")):
        for text in ("a tool", "a fruit", "a sock"):
            assert loaded(text=text).route == program(text=text).route


def test_saved_twice_and_saved_again_it_is_equal_byte_for_byte(tmp_path: Path) -> None:
    first, second = put(experts(), tmp_path / "first"), put(experts(), tmp_path / "second")
    third = put(load(first, embedder=TOPICS), tmp_path / "third")

    names = ["centroids.safetensors", "evidence.json", "manifest.json", "program.json"]
    assert [sorted(path.name for path in folder.iterdir()) for folder in (first, second, third)] == 3 * [names]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes() == (third / name).read_bytes()


def test_a_program_without_experts_is_saved_as_ever(tmp_path: Path) -> None:
    folder = put(Classify(SIGNATURE), tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["evidence.json", "manifest.json", "program.json"]
    assert "experts" not in read(folder).program


def test_the_catalogues_embedder_is_found_again_by_its_name_and_hash(tmp_path: Path) -> None:
    catalogued = embedder_of("all-minilm-l6-v2")
    loaded: Any = load(put(experts(made=router(catalogued)), tmp_path / "saved"))
    assert loaded.router.embedder.name == "all-minilm-l6-v2@53aa51172d14"


def test_an_embedder_that_isnt_there_is_asked_for_and_another_one_refused(tmp_path: Path) -> None:
    folder = put(experts(), tmp_path / "saved")

    with pytest.raises(ArtifactError, match=r"saved needs the embedder 'topics', which the catalogue doesn't have; pa"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"^The embedder other isn't the one the regions were made with"):
        load(folder, embedder=Embedder("other", lambda texts: [[1.0, 0.0] for _ in texts]))


def test_programs_are_compared_expert_by_expert(tmp_path: Path) -> None:
    before, after = put(experts(), tmp_path / "before"), put(experts("For all tools."), tmp_path / "after")
    plain = put(Classify(SIGNATURE, "Default."), tmp_path / "plain")

    assert compared(read(before), read(before)) == ""
    assert compared(read(before), read(after)).splitlines() == [
        "--- region 2: predict",
        "+++ region 2: predict",
        "@@ -1 +1 @@",
        "-For tools.",
        "+For all tools.",
    ]
    told = ["--- region 2: predict, demonstrations", "+++ region 2: predict, demonstrations", "@@ -0,0 +1 @@"]
    told += ['+{"label": "no", "text": "a tool"}']
    assert compared(read(plain), read(before)).splitlines() == [
        "--- region 2: predict",
        "+++ region 2: predict",
        "@@ -1 +1 @@",
        "-Default.",
        "+For tools.",
        *told,
        "--- router",
        "+++ router",
        "@@ -0,0 +1,3 @@",
        "+by topics, on text",
        "+region 1: default",
        "+region 2: its own expert",
    ]


def signed(folder: Path, change: Callable[[Any], object] = lambda tree: None, tensors: Any = None) -> Path:
    """Change a saved program behind its hashes' back."""
    tree = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    change(tree)
    (folder / "program.json").write_text(json.dumps(tree), encoding="utf-8")
    if tensors is not None:
        (folder / CENTROIDS).write_bytes(tensors if isinstance(tensors, bytes) else tensors_of(tensors))
    hashes = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("program.json", "evidence.json", CENTROIDS)
        if (folder / name).exists()
    }
    (folder / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
    return folder


def vectors(**changed: Any) -> dict[str, Any]:
    probe = np.array([0.5**0.5, 0.5**0.5], dtype=np.float32)
    return {"centroids": np.eye(2, dtype=np.float32), "probe": probe, **changed}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (b"", r"centroids\.safetensors is no safetensors file: "),
        (b"\x80\x04N.", r"centroids\.safetensors is no safetensors file: "),
        (vectors(centroids=np.eye(2)), r"holds 'centroids' of type float64, not float32"),
        (vectors(more=np.eye(2, dtype=np.float32)), r"holds \['centroids', 'more', 'probe'\], not centroids and probe"),
        (
            vectors(centroids=np.eye(3, 2, dtype=np.float32)),
            r"holds centroids of shape \(3, 2\); with 2 regions it must",
        ),
        (vectors(probe=np.ones(3, dtype=np.float32)), r"holds centroids of shape \(2, 2\); with 2 regions it must be"),
        (vectors(centroids=2 * np.eye(2, dtype=np.float32)), r"holds centroids whose length isn't 1"),
        (vectors(probe=np.full(2, np.nan, dtype=np.float32)), r"holds 'probe' with numbers that aren't finite"),
        (
            {"centroids": np.zeros((2, 0), dtype=np.float32), "probe": np.zeros(0, dtype=np.float32)},
            r"holds centroids of shape \(2, 0\)",
        ),
    ],
    ids=["empty", "pickle", "double", "more", "rows", "dimensions", "length", "not a number", "nothing"],
)
def test_centroids_that_dont_fit_are_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    folder = signed(put(experts(), tmp_path / "saved"), tensors=tensors)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder, embedder=TOPICS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["experts"].pop("radius"), r"experts\.radius must be a number, got None"),
        (lambda tree: tree["experts"].update(radius=float("nan")), r"experts\.radius must be in \[0, 2\], got nan"),
        (lambda tree: tree["experts"].update(radius=2.5), r"experts\.radius must be in \[0, 2\], got 2\.5"),
        (lambda tree: tree["experts"].update(regions=["a", "a"]), r"experts\.regions must be distinct names, at least"),
        (lambda tree: tree["experts"].update(fields=[]), r"experts\.fields must be distinct names, at least one"),
        (lambda tree: tree["experts"].update(fields=["lm"]), r"experts\.fields has 'lm', which would steer the call"),
        (lambda tree: tree["experts"].update(embedder=""), r"experts\.embedder must be one line of printable text"),
        (lambda tree: tree["experts"].update(student="experts"), r"experts\.student must be another module"),
        (lambda tree: tree["experts"].update(student="os:system"), r"holds a os:system; pass an instance"),
        (lambda tree: tree["experts"].update(regions=["a", "b"]), r"predictors of region 2, who is no expert"),
        (lambda tree: tree["predictors"].pop("default: predict"), r"predictors of no default, who is no expert"),
        (lambda tree: tree.pop("experts"), r"module must be 'experts' where there are experts, and only there"),
        (lambda tree: tree.update(module="classify"), r"module must be 'experts' where there are experts, and only"),
        (
            lambda tree: tree["experts"].update(regions=["region 1", "region 2", "c"]),
            r"with 3 regions it must be \(3, 2\)",
        ),
        (
            lambda tree: tree["predictors"]["region 2: predict"].update(inputs={}),
            r"region 2 has other predictors or fields than the default",
        ),
    ],
)
def test_experts_of_another_form_are_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    folder = signed(put(experts(), tmp_path / "saved"), change)
    with pytest.raises(ArtifactError, match=message):
        load(folder, embedder=TOPICS)


def test_a_missing_or_altered_file_of_centroids_is_refused(tmp_path: Path) -> None:
    folder = put(experts(), tmp_path / "saved")
    (folder / CENTROIDS).write_bytes(tensors_of(vectors(centroids=np.eye(2, dtype=np.float32)[::-1].copy())))
    with pytest.raises(ArtifactError, match=r"centroids\.safetensors was altered since it was saved"):
        read(folder)

    (folder / CENTROIDS).unlink()
    with pytest.raises(ArtifactError, match=r"saved is incomplete: centroids\.safetensors is missing"):
        read(folder)
    with pytest.raises(ArtifactError, match=r"saved is incomplete: centroids\.safetensors is missing"):
        read(signed(folder))


def test_a_save_that_couldnt_be_read_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^Can't write the program to .*experts\.radius must be in \[0, 2\]"):
        put(experts(made=replace(router(), radius=3.0)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
