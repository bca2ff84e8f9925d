"""At what a method's proposals are drawn: refused when it is set, not by the provider after paid calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import run
from preceptor.errors import ConfigError
from preceptor.teleprompters import APE, COPRO, GEPA, ConstitutionalExperts, MIPROv2, ProTeGi

SAMPLING: list[Any] = [APE, ProTeGi, ConstitutionalExperts, GEPA, MIPROv2, COPRO]


@pytest.mark.parametrize("temperature", [-0.1, 2.1, float("inf"), float("nan")])
@pytest.mark.parametrize("method", SAMPLING)
def test_a_temperature_at_which_no_model_is_asked_is_refused(method: Any, temperature: float) -> None:
    told = rf"^{method.__name__} needs temperature from 0 to 2, got {temperature}\.$"
    with pytest.raises(ConfigError, match=told):
        method(metric="accuracy", temperature=temperature)


@pytest.mark.parametrize("method", SAMPLING)
def test_the_temperatures_at_both_ends_may_be_asked_for(method: Any) -> None:
    assert [method(metric="accuracy", temperature=end).temperature for end in (0, 2)] == [0, 2]


@pytest.mark.parametrize("top_p", [-0.1, 0.0, 1.1, float("nan")])
def test_a_share_of_the_words_to_draw_from_that_is_none_is_refused(top_p: float) -> None:
    assert APE(metric="accuracy", top_p=1.0).top_p == 1.0
    with pytest.raises(ConfigError, match=rf"^APE needs top_p above 0 and up to 1, got {top_p}\.$"):
        APE(metric="accuracy", top_p=top_p)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--set", "temperature=3"], "APE needs temperature from 0 to 2, got 3.0."),
        (["--set", "top_p=nan"], "APE needs top_p above 0 and up to 1, got nan."),
        (["--method", "miprov2", "--seed", "4294967296"], "MIPROv2 needs seed < 4294967296, got 4294967296."),
        (["--seed", "-1"], "APE needs seed >= 0, got -1."),
    ],
)
def test_a_compile_at_such_settings_is_a_wrong_use(
    settings: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "a,x\nb,y\n" * 12, encoding="utf-8")
    place = ["--data", str(tmp_path / "rows.csv"), "--run", str(tmp_path / "run"), "--lm", "openai/none"]
    assert run(["compile", "text -> label: Literal['x', 'y']", *place, *settings]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
