"""What tests of every folder share: the small language model, loaded once."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import dspy
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

import preceptor
from preceptor.testing.models import Simulated

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else DSPy asks the network for prices, 5 s a try

hypothesis_settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("untimed")  # on a busy machine an example can take a second longer than the last one


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


@pytest.fixture(scope="session")
def save_encoder() -> Callable[[Path, Mapping[str, Sequence[float]]], Path]:
    """Return a function that saves a real, tiny embedder into a folder: a text lies at the mean of its words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    def save(folder: Path, words: Mapping[str, Sequence[float]]) -> Path:
        known = ["[UNK]", *words]
        tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        vectors = [[0.0] * len(next(iter(words.values()))), *words.values()]
        weights = np.array(vectors, dtype=np.float32)
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(
            str(folder), create_model_card=False
        )
        return folder

    return save
