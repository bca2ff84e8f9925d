"""What tests of every folder share: the small language model, loaded once."""

from __future__ import annotations

import os
import random
import sys
import time

import dspy
import pytest
import torch

import preceptor
from preceptor.testing.models import Simulated

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else DSPy asks the network for prices, 5 s a try


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="Threads take turns as unluckily as can be.")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--stress"):
        return
    sys.setswitchinterval(1e-6)
    complete, drawn = Simulated.complete, random.Random(0)

    def dawdle() -> None:
        if drawn.random() < 0.1:
            time.sleep(drawn.random() * 0.004)

    def late(self: Simulated, request: dspy.lm15.Request) -> dspy.lm15.Response:
        dawdle()
        answer = complete(self, request)
        dawdle()
        return answer

    Simulated.complete = late  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def smollm() -> dspy.LM:
    """Return the smallest model of the catalogue; greedy, at most 512 tokens an answer."""
    torch.set_num_threads(1)  # on a busy machine several threads spin for each other 20 times longer than they work
    return preceptor.LocalLM("smollm2-135m")
