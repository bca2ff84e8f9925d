"""Texts as unit vectors: what an embedder must return, and which one a name stands for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.errors import ConfigError, ModelError
from preceptor.lm.embedding import BATCH, Embedder, embedder_of, named_in_artifact

CATALOGUED = "all-minilm-l6-v2@53aa51172d14"


def lengths(texts: Sequence[str]) -> list[list[int]]:
    return [[len(text), 3 * len(text)] for text in texts]


def test_vectors_have_length_one_in_the_order_of_the_texts() -> None:
    made = Embedder("lengths", lambda texts: [[len(text), 0.0] if text == "a" else [3.0, 4.0] for text in texts])

    vectors = made(["b", "a", "b"])

    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[np.float32(0.6), np.float32(0.8)], [1.0, 0.0], [np.float32(0.6), np.float32(0.8)]]


def test_equal_texts_are_embedded_once_in_batches_with_progress() -> None:
    batches: list[int] = []
    told: list[tuple[str, int, int]] = []

    def embed(texts: Sequence[str]) -> Any:
        batches.append(len(texts))
        return lengths(texts)

    Embedder("own", embed)([f"text {n % 100}" for n in range(300)], lambda *what: told.append(what))

    assert batches == [BATCH, 100 - BATCH]
    assert told == [("embedding 100 texts", done, 100) for done in (0, 64, 100)]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1.0, 2.0], r"The embedder own must return 2 vectors of finite numbers for as many texts, not .* \(2,\)"),
        ([[1.0, 2.0]], r"must return 2 vectors"),
        ([[1.0], [float("nan")]], r"of finite numbers"),
    ],
    ids=["flat", "one short", "not a number"],
)
def test_what_is_no_embedding_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Embedder("own", lambda texts: made)(["a", "b"])


def test_a_text_of_which_the_embedder_knows_nothing_has_no_direction() -> None:
    made = Embedder("own", lambda texts: [[3.0, 4.0], [0.0, 0.0]])(["a", "b"])
    assert made.tolist() == [[np.float32(0.6), np.float32(0.8)], [0.0, 0.0]]


def test_an_embedders_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match="one line of printable text"):
        Embedder("a\nb", lengths)


def test_a_name_stands_for_the_catalogues_model_a_folder_or_the_users_own() -> None:
    own = Embedder("own", lengths)
    assert embedder_of(own) is own
    assert embedder_of("all-minilm-l6-v2").name == CATALOGUED
    assert embedder_of("org/encoder").name == "hub/org/encoder" != embedder_of("other/encoder").name
    with pytest.raises(ConfigError, match=r"^smollm2-135m is no embedder; the catalogue has all-minilm-l6-v2\.$"):
        embedder_of("smollm2-135m")


def test_an_artifacts_embedder_is_the_catalogues_with_the_same_hash_or_none() -> None:
    assert named_in_artifact(CATALOGUED).name == CATALOGUED
    with pytest.raises(ModelError, match=r"needs the embedder 'own/bge', which the catalogue doesn't have; pass it"):
        named_in_artifact("own/bge")
    with pytest.raises(ModelError, match=r"made with .*@000000000000', and the catalogue's has the hash 53aa51172d14"):
        named_in_artifact("all-minilm-l6-v2@000000000000")


def test_a_folder_that_holds_no_model_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ModelError, match=r"^Can't load the embedder .*empty: it has neither modules\.json nor config\."
    ):
        embedder_of(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["", "./gone", "/models/gone", "models/our/gone"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_before_anything_is_fetched(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"^No embedder '.*': it is no folder and no hub id; the catalogue has all-min"
    ):
        embedder_of(name)


def test_a_folders_name_tells_its_weights_and_a_model_trained_further_is_loaded_anew(
    tmp_path: Path, save_encoder: Callable[[Path, Mapping[str, Sequence[float]]], Path]
) -> None:
    first = save_encoder(tmp_path / "v1" / "encoder", {"fruit": [1, 0], "tools": [0, 1]})
    other = save_encoder(tmp_path / "v2" / "encoder", {"fruit": [0, 1], "tools": [1, 0]})
    before = embedder_of(str(first))
    assert re.fullmatch(r"own/encoder@[0-9a-f]{12}", before.name)
    assert embedder_of(str(other)).name != before.name
    assert before(["fruit 1"]).tolist() == [[1, 0]]

    shutil.rmtree(first)
    shutil.move(other, first)
    after = embedder_of(str(first))
    assert after.name != before.name
    assert after(["fruit 1"]).tolist() == [[0, 1]]
    (first / "README.md").write_text("It embeds.", encoding="utf-8")
    assert embedder_of(str(shutil.move(first, tmp_path / "encoder"))).name == after.name, "the same model, moved"


def test_the_real_model_puts_like_beside_like_and_a_text_alone_where_it_is_in_company() -> None:
    embedder = embedder_of("all-minilm-l6-v2")
    cat, kitten, tax = together = embedder(["A cat sleeps.", "A kitten is napping.", "File the tax return by May."])

    assert together.shape == (3, 384)
    assert cat @ kitten > 0.5 > cat @ tax
    assert np.allclose(embedder(["A cat sleeps."])[0], cat, atol=1e-5)
