"""What tells one compile from another; the checks are tested where they refuse, in `test_teleprompter`."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from preceptor.errors import ConfigError
from preceptor.given import checked, parts_of
from preceptor.modules import Classify
from preceptor.run import fingerprint
from preceptor.teleprompters import APE
from preceptor.testing import asked, simulated

ROWS = [dspy.Example(text=f"row {n}", label=["spam", "mail"][n % 2]).with_inputs("text") for n in range(20)]


def parts(
    *, rows: list[dspy.Example] = ROWS, instructions: str = "Spam?", metric: str = "accuracy", **knobs: Any
) -> Any:
    method: Any = APE(metric=metric, **knobs)
    program = Classify("text -> label: Literal['spam', 'mail']", instructions)
    method, train, confirm, _, wrapped = checked(method, program, rows, None)
    return parts_of(method, program, train, confirm, wrapped)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, set()),
        ({"threads": 3}, set()),
        ({"candidates": 3}, {"method"}),
        ({"metric": "macro_f1"}, {"metric"}),
        ({"instructions": "Mail?"}, {"student"}),
        ({"rows": ROWS[:18]}, {"trainset", "valset"}),
    ],
)
def test_a_compile_is_told_apart_by_what_it_is_given_and_not_by_how_it_is_run(
    change: dict[str, Any], names: set[str]
) -> None:
    known, other = parts(), parts(**change)
    assert {name for name in known if known[name] != other[name]} == names


@pytest.mark.parametrize(
    ("adapter", "names"),
    [
        (dspy.ChatAdapter(), set()),
        (dspy.ChatAdapter(use_json_adapter_fallback=False), {"student"}),
        (dspy.JSONAdapter(), {"student"}),
        (dspy.TwoStepAdapter(dspy.LM("openai/extracting")), {"student"}),
    ],
)
def test_a_compile_under_another_adapter_than_dspys_own_is_another(adapter: dspy.Adapter, names: set[str]) -> None:
    known = parts()
    with dspy.context(adapter=adapter):
        other = parts()
    assert {name for name in known if fingerprint(known[name]) != fingerprint(other[name])} == names


def test_adapters_are_told_apart_by_their_settings_and_their_models() -> None:
    adapters = [
        *(dspy.JSONAdapter(use_native_function_calling=uses) for uses in (True, False)),
        *(dspy.TwoStepAdapter(dspy.LM(name)) for name in ("openai/one", "openai/other", "openai/other")),
    ]
    prints = list[str]()
    for adapter in adapters:
        with dspy.context(adapter=adapter):
            prints.append(fingerprint(parts()["student"]))
    assert len(set(prints)) == 4
    assert prints[-1] == prints[-2]


class Settings(dspy.Module):
    """A class of the user's, whose fields are called what DSPy calls a setting."""

    def __init__(self, signature: str) -> None:
        super().__init__()
        self.predict = dspy.Predict(signature)

    def forward(self, text: str) -> Any:
        return self.predict(config=text) if "config ->" in str(self.predict.signature) else self.predict(text=text)


@pytest.mark.parametrize(
    ("program", "field"),
    [
        (Settings("config -> label"), "config"),
        (Classify("text -> completions: Literal['spam', 'mail']"), "completions"),
        (dspy.ChainOfThought("text -> label, demos"), "demos"),
    ],
)
def test_a_field_that_dspy_takes_for_a_setting_is_refused(program: dspy.Module, field: str) -> None:
    told = rf"^The predictor \S+ has a field '{field}', which DSPy takes for a setting of the call\. Rename the field; "
    with pytest.raises(ConfigError, match=told):
        checked(APE(metric="accuracy"), program, [row.copy(**{field: row.label}) for row in ROWS], None)


def _same_config(gold: Any, told: Any) -> bool:
    return bool(told.config == gold.config)


def test_an_output_of_a_users_own_class_may_have_such_a_name() -> None:
    rows = [row.copy(config=row.label) for row in ROWS]
    assert checked(APE(metric=_same_config), Settings("text -> config"), rows, None)[3] == "config"


def test_a_program_that_couldnt_be_read_again_is_refused_before_it_is_compiled() -> None:
    program = Classify("text -> label: Literal['spam', 'mail']")
    deep: Any = "row"
    for _ in range(40):
        deep = [deep]
    program.predict.demos = [dspy.Example(text=deep, label="spam")]
    with pytest.raises(
        ConfigError, match=r"^A program like Classify couldn't be saved: program\.json is nested deeper"
    ):
        checked(APE(metric="accuracy"), program, ROWS, None)


class Gateway(dspy.BaseLM):
    """A model of the user's, none of `dspy.LM`."""


TEXT = r" is the text 'openai/x', and a compile needs a model: (lm|proposer)=dspy\.LM\('openai/x'\)\.$"
OTHER = r" is a Gateway, whose calls can't be counted; a compile needs a dspy\.LM\. Make it the engine of one: "


@pytest.mark.parametrize("name", ["lm", "proposer"])
@pytest.mark.parametrize(("given", "told"), [("openai/x", TEXT), (Gateway("my/model"), OTHER)])
def test_what_is_no_model_that_can_be_counted_is_refused_by_the_name_it_was_given_under(
    name: str, given: Any, told: str
) -> None:
    answers = simulated(lambda request: "spam")
    method = APE(metric="accuracy", **{"lm": answers, name: given})
    with pytest.raises(ConfigError, match=f"^{name}{told}"):
        method.compile(Classify("text -> label: Literal['spam', 'mail']"), trainset=ROWS)
    assert asked(answers) == []


def test_a_model_set_in_dspy_that_cant_be_counted_is_refused() -> None:
    with dspy.context(lm=Gateway("my/model")), pytest.raises(ConfigError, match=f"^lm{OTHER}"):
        APE(metric="accuracy").compile(Classify("text -> label: Literal['spam', 'mail']"), trainset=ROWS)


@pytest.mark.parametrize("is_own", [False, True])
def test_a_model_whose_name_couldnt_be_saved_is_refused_before_it_is_asked(is_own: bool) -> None:
    program, answers = Classify("text -> label: Literal['spam', 'mail']"), simulated(lambda request: "spam")
    placed = dspy.LM("s3://me:secret@bucket/model", engine=answers.engine)
    if is_own:
        program.set_lm(placed)
    told = r"^A program of the model s3://bucket/model couldn't be saved: its name is an address, which isn't kept\. "
    with pytest.raises(ConfigError, match=told):
        APE(metric="accuracy", lm=answers if is_own else placed).compile(program, trainset=ROWS)
    assert asked(answers) == []
