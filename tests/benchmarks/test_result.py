from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from preceptor.benchmarks.result import give


def shown(result: dict[str, Any]) -> None:
    typer.echo(f"{result['rows']} rows")


@pytest.mark.parametrize(("as_json", "printed"), [(True, '{\n  "rows": 3\n}\n'), (False, "3 rows\n")])
def test_a_result_is_printed_for_a_reader_of_one_kind(
    capsys: pytest.CaptureFixture[str], as_json: bool, printed: str
) -> None:
    give({"rows": 3}, None, as_json=as_json, show=shown)
    assert capsys.readouterr().out == printed


def test_a_file_gets_the_whole_of_it_and_no_part_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("x" * 1000, encoding="utf-8")
    give({"rows": 3}, path, as_json=False, show=shown)
    assert json.loads(path.read_text(encoding="utf-8")) == {"rows": 3}
