"""A language model behind HTTP, on the loopback interface only, and one exact enough to compare numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy
import pytest
import torch
from transformers import AutoModelForCausalLM

from preceptor.lm.fetch import WEIGHTS, fetch
from preceptor.lm.local import LocalEngine
from preceptor.lm.prepacked import prepacked
from preceptor.testing import ChatServer

KEY = "sk-secret-0123456789"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """Return a server that answers the last message in capitals."""
    with ChatServer(lambda body: str(body["messages"][-1]["content"]).upper(), key=KEY) as running:
        yield running


@pytest.fixture(scope="session")
def engine(smollm: dspy.LM) -> LocalEngine:
    """Return the engine of smollm."""
    assert isinstance(smollm.engine, LocalEngine)
    return smollm.engine


@pytest.fixture(scope="session")
def precise(engine: LocalEngine) -> LocalEngine:
    """Return smollm in float32 on the processor: bfloat16 rounds differently in every layout of a batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        fetch("smollm2-135m") / WEIGHTS, dtype=torch.float32, attn_implementation="sdpa"
    )
    prepacked(model)
    return LocalEngine(lambda: model, model.config, engine._tokenizer, engine.name)
