from __future__ import annotations

from pathlib import Path

import dspy
import pytest

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
    with pytest.raises(ConfigError, match=r"^No task 'news'; there are subj, trec, tickets\.$"):
        engine._requests(smollm, "news", Path(), 3)
