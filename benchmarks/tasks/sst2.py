"""SST-2: is a sentence of a film review positive or negative."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Hub, Published, Shots

HUB: Final = Hub("SetFit/sst2", "00ea8ccb7a54b4e3780a3e51aa3f80361ff849c0")

TASK: Final = Published(
    name="sst-2",
    signature="sentence -> kind: Literal['negative', 'positive']",
    instructions="Decide whether the review is positive or negative.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Socher et al., 2013; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(32, 32, 200),
    hub=HUB,
    rows=Shots(folder="sst-2", labels=("negative", "positive"), hub=HUB, numbered=("negative", "positive")),
)
