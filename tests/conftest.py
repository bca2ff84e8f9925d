"""What tests of every folder share: the small language model, loaded once."""

from __future__ import annotations

import dspy
import pytest
import torch

import preceptor


@pytest.fixture(scope="session")
def smollm() -> dspy.LM:
    """Return the smallest model of the catalogue; greedy, at most 512 tokens an answer."""
    torch.set_num_threads(1)  # on a busy machine several threads spin for each other 20 times longer than they work
    return preceptor.LocalLM("smollm2-135m")
