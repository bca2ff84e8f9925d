"""AG News: the section a piece of news belongs to."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Hub, Published, Shots

HUB: Final = Hub("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4")

TASK: Final = Published(
    name="agnews",
    signature="sentence -> kind: Literal['world', 'sports', 'business', 'technology']",
    instructions="Classify the news article by its topic.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Zhang et al., 2015; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(64, 64, 200),
    hub=HUB,
    rows=Shots(
        folder="agnews",
        labels=("world", "sports", "business", "technology"),
        hub=HUB,
        numbered=("world", "sports", "business", "technology"),
    ),
)
