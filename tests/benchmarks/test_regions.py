from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preceptor.benchmarks import regions
from preceptor.benchmarks.regions import CONTENDERS, DIMENSIONS, clustered, routing, vectors
from preceptor.cli.tools import as_command
from preceptor.errors import ConfigError
from preceptor.lm.embedding import Embedder


def test_the_vectors_are_the_same_every_time_and_of_length_1() -> None:
    made = vectors(5000, 3, 0)
    assert made.shape == (5000, DIMENSIONS)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert (made == vectors(5000, 3, 0)).all()
    assert len(np.unique(made, axis=0)) == 5000


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_contender_finds_centroids_and_its_fit_is_what_its_vectors_say(contender: str) -> None:
    data = vectors(600, 2, 0)
    found = clustered(contender, data, 2)
    # two centres and noise of 0.07 in 384 dimensions: a cosine of 1 / sqrt(1 + 384 * 0.07**2) = 0.589 to one's own
    assert found["distance"] == pytest.approx(1 - 0.589, abs=0.02)
    # to the mean itself, which is as short as that cosine: 1 - 0.589**2; to one of length 1: 2 - 2 * 0.589
    assert found["inertia"] == pytest.approx(2 - 2 * 0.589 if contender == "ours" else 1 - 0.589**2, abs=0.02)
    assert found["seconds"] > 0
    assert found["data megabytes"] == 600 * DIMENSIONS * 4 / 1e6


def test_routing_is_measured_with_and_without_embedding() -> None:
    embedder = Embedder("short", lambda texts: [[float(len(text)), 1.0] for text in texts])
    with_texts, without = routing(4, 300, 3, embedder), routing(4, 300, 0, None)
    assert set(without) == {"regions", "all at once routes/s", "one at a time routes/s"}
    assert set(with_texts) - set(without) == {"requests", "embedding ms", "search ms"}
    assert all(value > 0 for value in with_texts.values())


def test_the_benchmark_runs_a_contender_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "500", "--regions", "4", "--routes", "200", "--requests", "0"]
    as_command("regions", regions.run, [*sizes, "--contender", "ours", "--out", str(tmp_path / "out.json"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (printed["rows"], printed["regions"]) == (500, 4)
    assert [row["contender"] for row in printed["clustering"]] == ["ours"]
    assert printed["clustering"][0]["megabytes"] >= 0


def test_an_unknown_contender_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^No contender 'annoy'; there are ours, faiss, faiss, all, scikit-learn\.$"):
        as_command("regions", regions.run, ["--contender", "annoy"])
