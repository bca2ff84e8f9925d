"""What tests of every folder share: the small language model, loaded once."""

from __future__ import annotations

import os

import dspy
import pytest
import torch

import preceptor

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else DSPy asks the network for prices, 5 s a try


@pytest.fixture(scope="session")
def smollm() -> dspy.LM:
    """Return the smallest model of the catalogue; greedy, at most 512 tokens an answer."""
    torch.set_num_threads(1)  # on a busy machine several threads spin for each other 20 times longer than they work
    return preceptor.LocalLM("smollm2-135m")
