from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from transformers import DynamicCache

from preceptor import ConfigError
from preceptor.benchmarks import engine
from preceptor.lm import decoding


def test_the_tickets_are_rendered_as_the_models_prompts(smollm: dspy.LM) -> None:
    requests = engine._requests(smollm, "tickets", None, 3)
    assert len(requests) == 3
    assert str(requests[0].system).startswith("Route the support ticket to the right queue.")
    choices = (requests[0].config.extensions or {})["choices"]
    assert choices == ["bell", "bench", "desk", "dock", "door", "vault"]


def test_published_rows_need_a_data_folder(smollm: dspy.LM) -> None:
    with pytest.raises(ConfigError, match=r"^trec needs --data-dir, the folder that holds lmbff_16shot\.$"):
        engine._requests(smollm, "trec", None, 3)
    with pytest.raises(
        ConfigError, match=r"^No task 'news'; there are subj, trec, tickets, decoding, prompts, edits, steps\.$"
    ):
        engine._requests(smollm, "news", Path(), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU reads prompts filled up")
def test_a_rounds_prompts_are_read_in_blocks_and_filled_up(smollm: dspy.LM) -> None:
    found = engine._prompts(smollm)
    assert found["prompt_tokens"] > 8 * 150
    assert found["times_filled_up"] == found["seconds_filled_up"] / found["seconds"]


def test_edits_are_the_same_texts_looking_ahead_and_are_left_out_where_nothing_looks(
    smollm: dspy.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LONG", 6)
    if "edits" in engine._parts(smollm, None):
        found = engine._edits(smollm)
        assert 4 <= found["tokens"] <= 4 * 6
        assert found["equal_to_one_a_step"] == 4
        assert found["times_one_a_step"] == found["seconds_one_a_step"] / found["seconds"]

    monkeypatch.setattr("preceptor.lm.ahead.can_look", lambda model: False)
    steps = [] if torch.cuda.is_available() else ["steps"]
    assert engine._parts(smollm, None) == ["tickets", "decoding", "prompts", *steps]
    with pytest.raises(ConfigError, match=r"^No looking ahead here: torch has no FBGEMM for this processor, or"):
        engine._edits(smollm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps are replayed graphs on a GPU")
def test_steps_are_timed_as_they_are_then_with_keys_copied_then_with_plain_layers_too(
    smollm: dspy.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, type, str]] = []
    timed = engine._step

    def step(own: Any, model: Any, texts: int, tokens: int) -> float:
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
        kind = type(model.model.layers[0].mlp.up_proj)
        told.append((texts, tokens, kind, type(decoding._roomy(cache).layers[0]).__name__))
        return timed(own, model, texts, tokens)

    monkeypatch.setattr(engine, "_step", step)
    monkeypatch.setattr(engine, "STEPPED", {"few_short": (2, 8), "many_long": (3, 12)})
    monkeypatch.setattr(engine, "STEPS", 2)

    found = engine._steps("smollm2-135m", smollm)

    ours: Any = smollm.engine
    laid_out = type(ours._model.model.layers[0].mlp.up_proj)
    ways = [(laid_out, "Growing"), (laid_out, "DynamicLayer"), (torch.nn.Linear, "DynamicLayer")]
    assert told == [(*size, *way) for way in ways for size in ((2, 8), (3, 12))]
    assert list(found) == [f"{size}{way}" for way in ("", "_copied", "_plain") for size in ("few_short", "many_long")]
    assert min(found.values()) > 0


def test_each_part_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    read = {"model": "m", "task": "prompts", "prompt_tokens": 8, "seconds": 1.5, "seconds_filled_up": 3.0}
    engine._print({"cores": 2, "bf16_gflops": 9, "measured": [{**read, "times_filled_up": 2.0}]})
    out = capsys.readouterr().out
    assert "Rows per second" not in out
    assert [line.split() for line in out.splitlines()][-1] == ["m", "8", "1.500", "3.000", "2.000"]
