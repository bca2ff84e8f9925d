from __future__ import annotations

import json
from pathlib import Path

from preceptor.benchmarks.published import _best_candidate


def test_the_best_candidate_is_the_best_of_those_that_saw_the_most_rows(tmp_path: Path) -> None:
    trials = [
        {"instructions": {"predict": "seed"}, "scores": [1.0, 0.0]},
        {"instructions": {"predict": "lucky"}, "scores": [1.0, 1.0]},
        {"instructions": {"predict": "good"}, "scores": [1.0, 1.0]},
        {"instructions": {"predict": "seed"}, "scores": [0.0, 0.0]},
        {"instructions": {"predict": "good"}, "scores": [1.0, None]},
    ]
    (tmp_path / "trials.jsonl").write_text("\n".join(map(json.dumps, trials)) + "\n", encoding="utf-8")
    assert _best_candidate(tmp_path) == {"predict": "good"}
