"""subj: is a sentence of a film review or its plot subjective or objective."""

from __future__ import annotations

from typing import Final

from preceptor.benchmarks.tasks.published import Hub, Published, Shots

HUB: Final = Hub("SetFit/subj", "f3c1162e678417f664d76b21864fdb87b0615fcf")

TASK: Final = Published(
    name="subj",
    signature="sentence -> kind: Literal['subjective', 'objective']",
    instructions="Decide whether the sentence is subjective or objective.",
    metric="accuracy",
    licence="terms of the corpus; the 16-shot draws are MIT",
    citation="Pang and Lee, 2004; draws by Deng et al., 2022 (RLPrompt)",
    sizes=(32, 32, 200),
    hub=HUB,
    rows=Shots(folder="subj", labels=("subjective", "objective"), hub=HUB, numbered=("objective", "subjective")),
)
