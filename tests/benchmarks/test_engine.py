from __future__ import annotations

from pathlib import Path

import dspy
import pytest
import torch

from preceptor import ConfigError
from preceptor.benchmarks import engine


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
        ConfigError, match=r"^No task 'news'; there are subj, trec, tickets, decoding, prompts, edits\.$"
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
    if engine._parts(smollm, None)[-1] == "edits":
        found = engine._edits(smollm)
        assert 4 <= found["tokens"] <= 4 * 6
        assert found["equal_to_one_a_step"] == 4
        assert found["times_one_a_step"] == found["seconds_one_a_step"] / found["seconds"]

    monkeypatch.setattr("preceptor.lm.ahead.can_look", lambda model: False)
    assert engine._parts(smollm, None) == ["tickets", "decoding", "prompts"]
    with pytest.raises(ConfigError, match=r"^No looking ahead here: torch has no FBGEMM for this processor, or"):
        engine._edits(smollm)


def test_each_part_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    read = {"model": "m", "task": "prompts", "prompt_tokens": 8, "seconds": 1.5, "seconds_filled_up": 3.0}
    engine._print({"cores": 2, "bf16_gflops": 9, "measured": [{**read, "times_filled_up": 2.0}]})
    out = capsys.readouterr().out
    assert "Rows per second" not in out
    assert [line.split() for line in out.splitlines()][-1] == ["m", "8", "1.500", "3.000", "2.000"]
