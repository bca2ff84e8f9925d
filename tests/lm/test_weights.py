"""Where a model's weights are, and what tells one model's files from another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.lm.weights import locate


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "merges.txt", "tokenizer.model", "config.json", "x.safetensors"]
)
def test_a_models_fingerprint_tells_of_each_of_its_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("A model.")
    before = locate(str(tmp_path), None)[1]
    (tmp_path / "README.md").write_text("A good model.")
    assert locate(str(tmp_path), None)[1] == before
    (tmp_path / name).write_text("{ }")
    assert locate(str(tmp_path), None)[1] != before
