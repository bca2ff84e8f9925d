"""What users type, turned into programs, models, metrics and rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, get_origin

import dspy
import typer

from preceptor.checks import refuse_steering
from preceptor.cli.pairs import pair, pairs
from preceptor.cli.view import download
from preceptor.data import examples, load_rows
from preceptor.errors import ConfigError
from preceptor.lm.adapter import choices, is_direct
from preceptor.lm.budget import Budget
from preceptor.lm.catalogue import DEFAULT
from preceptor.lm.redaction import without_credentials
from preceptor.lm.seam import predictors
from preceptor.program import Artifact
from preceptor.taken import names_inputs, taken
from preceptor.values import is_json

Columns = Annotated[
    list[str] | None, typer.Option("--column", help="FIELD=COLUMN, for a field whose column has another name.")
]

DEFAULT_LM: Final = f"local/{DEFAULT}"
MAX_TOKENS: Final = 512
REASONING_TOKENS: Final = 16_000
"""Fewest that DSPy lets OpenAI's reasoning models have."""

LOCAL: Final = "local/"
"""Before the name of a model in this process."""

_PROGRAMS: Final = "a signature has '->', as in \"text -> label: Literal['a', 'b']\"; other programs are FILE.py:NAME"

_PRINT: Final = re.compile(r"@[0-9a-f]{12}$")
"""The fingerprint of a local model's weights, behind its id."""


def entries(group: str) -> dict[str, Any]:
    """Return what is installed under `preceptor.<group>`, by name."""
    return {entry.name: entry for entry in entry_points(group=f"preceptor.{group}")}


def is_saved(target: str) -> bool:
    """Return True if a target is a folder, and so a saved program; a signature may be too long to be one's name.

    Raises:
        ConfigError: If it can be neither, nor an object of a Python file.
    """
    if "->" in target:
        return False
    with contextlib.suppress(OSError):  # too long to be a path
        if Path(target).is_dir():
            return True
    if ".py:" not in target:
        raise ConfigError(f"No folder {target!r} of a saved program; {_PROGRAMS}.")
    return False


def program_of(target: str, instructions: str | None) -> dspy.Module:
    """Return a program from `FILE.py:NAME`, or from a signature written out.

    Raises:
        ConfigError: If there is no such file or name, or it is neither a module, a signature nor a function of one.
    """
    if "->" in target:
        return _declared(_signature(target), instructions)
    if ".py:" not in target:
        raise ConfigError(f"{target!r} is no program to be asked: {_PROGRAMS}. A saved one can't be compiled again.")
    found = _named(target, "a module, a signature, or a function that returns one")
    if inspect.isfunction(found) or (inspect.isclass(found) and issubclass(found, dspy.Module)):
        with _users(f"{target}, called without arguments,"):
            found = found()
    if inspect.isclass(found) and issubclass(found, dspy.Signature):
        return _declared(found, instructions)
    if not isinstance(found, dspy.Module):
        raise ConfigError(f"{target} is a {type(found).__name__}; it must be a dspy.Module or a dspy.Signature.")
    if not predictors(found):
        raise ConfigError(f"{target} has no predictor, such as dspy.Predict, whose instructions could be improved.")
    if instructions is not None:
        raise ConfigError("--instructions goes with a signature; a module has its own.")
    return found


def _signature(text: str) -> Any:
    try:
        found: Any = dspy.ensure_signature(text)
    except (ValueError, SyntaxError, TypeError) as error:
        refuse_steering(text, re.findall(r"\w+", text))
        raise ConfigError(
            f"{text!r} is no signature: {error}. Write it as \"text -> label: Literal['a','b']\"."
        ) from error
    if not found.input_fields or not found.output_fields:
        missing = "input" if not found.input_fields else "output"
        raise ConfigError(f"{text!r} has no {missing}. Write it as \"text -> label: Literal['a','b']\".")
    return found


def _declared(signature: Any, instructions: str | None) -> dspy.Module:
    refuse_steering("predict", signature.fields)
    name = "classify" if is_direct(signature) and choices(signature) else "generate"
    program: dspy.Module = entries("modules")[name].load()(signature, instructions)
    return program


def _named(target: str, wanted: str) -> Any:
    """Return an object of a Python file of the user's."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not file or path.suffix != ".py":
        raise ConfigError(f"{target!r} is not FILE.py:NAME, where NAME is {wanted}.")
    if not path.is_file():
        raise ConfigError(f"No file {path}.")
    module = _imported(path.resolve(), path.stat().st_mtime_ns)
    if not hasattr(module, name):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(f"{path} has no {name!r}; it has {', '.join(public)}.")
    return getattr(module, name)


@cache
def _imported(path: Path, changed: int) -> ModuleType:
    """Return a file of the user's as a module, executed once as long as it isn't changed; it may import its neighbours.

    It has the file's name, unless another module has that.
    """
    del changed
    known, name = {*sys.modules, *sys.stdlib_module_names}, path.stem
    if name in known or not name.isidentifier() or importlib.util.find_spec(name) is not None:
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} can't be imported.")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        with _users(f"{path}, imported,"):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _users(what: str) -> Generator[None]:
    """Run code of the user's.

    Raises:
        ConfigError: With whatever it raised.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} raised {type(error).__name__}: {error}") from error


def lm_of(name: str, api_base: str | None = None, max_tokens: int | None = None) -> dspy.LM:
    """Return a language model from `local/<id>` or any name DSPy knows; keys come from the environment.

    Args:
        name: Of a model in this process, with the fingerprint of its weights or without.
        api_base: Address of a server.
        max_tokens: Most tokens of an answer; by default 512, of a model that reasons 16,000.

    Raises:
        ConfigError: If the model can't be with these settings, or its weights are others than the name says.
        ModelError: If a local model isn't there and can't be fetched.
    """
    if name.startswith(LOCAL):
        from preceptor.lm.local import LocalLM  # torch, which no other model needs

        return _pinned(LocalLM(local_id(name), progress=download(), max_tokens=max_tokens or MAX_TOKENS), name)
    if api_base is not None and api_base != without_credentials(api_base):
        raise ConfigError(
            f"--api-base {without_credentials(api_base)} came with a user, a password or a query, which aren't sent. "
            "Keys come from the environment only, e.g. OPENAI_API_KEY."
        )
    settings: dict[str, Any] = {"cache": False} if api_base is None else {"cache": False, "api_base": api_base}
    try:
        return dspy.LM(name, temperature=0.0, max_tokens=max_tokens or MAX_TOKENS, **settings)
    except dspy.LMConfigurationError:  # a model that reasons: its answer's bound holds the reasoning, too
        return _reasoning(name, max_tokens or REASONING_TOKENS, settings)
    except ValueError as error:
        raise ConfigError(f"{name!r} is no language model: {error}. Write it as openai/gpt-4o-mini.") from error


def lm_named(saved: Artifact, lm: str | None, api_base: str | None) -> str:
    """Return the name of a saved program's model, or of the one that was asked for in its place.

    Raises:
        ConfigError: If the program's was a server's of one's own: what it is asked would go to another.
    """
    known = str(saved.program["lm"])
    if lm is None and api_base is None and saved.program.get("has_address"):
        raise ConfigError(
            f"{saved.path} was compiled with {known} at an address of its own, which isn't kept. Give it with "
            "--api-base, or name another model with --lm."
        )
    return known if lm is None else lm


def _reasoning(name: str, max_tokens: int, settings: Mapping[str, Any]) -> dspy.LM:
    try:
        return dspy.LM(name, temperature=None, max_tokens=max_tokens, **settings)
    except dspy.LMConfigurationError as error:
        raise ConfigError(
            f"{name} reasons before it answers, within --max-tokens: {REASONING_TOKENS} at least, not {max_tokens}."
        ) from error


def local_id(name: str) -> str:
    """Return the id of `local/<id>` or `local/<id>@<fingerprint>`."""
    return _PRINT.sub("", name.removeprefix(LOCAL))


def _pinned(lm: dspy.LM, name: str) -> dspy.LM:
    """Return the model if its weights are those that the name pins, or the name pins none."""
    if _PRINT.search(name) and lm.model != name:
        bare = f"local/{local_id(name)}"
        raise ConfigError(
            f"The weights of {bare} are others than those that are asked for: they are {lm.model}, not {name}. "
            f"Get those back, or go on with these: --lm {bare}."
        )
    return lm


def lm_on(workers: str | None, name: str, api_base: str | None = None, max_tokens: int | None = None) -> dspy.LM:
    """Return a language model in this process, or in those that `ray` or `ray:<number>` names.

    Raises:
        ConfigError: As `workers_of`; and ModelError if the workers can't be had, or can't load the model.
    """
    if workers is None:
        return lm_of(name, api_base, max_tokens)
    number = workers_of(workers, name)
    from preceptor.lm.local import LocalLM
    from preceptor.lm.workers import RayLM

    made = partial(LocalLM, local_id(name), max_tokens=max_tokens or MAX_TOKENS)
    return _pinned(RayLM(made, number), name)


def workers_of(workers: str, name: str) -> int | None:
    """Return the number in `ray:<number>`, None of `ray`; for a model of this name.

    Raises:
        ConfigError: If it is neither, or the model is a server's: threads are enough to wait for it.
    """
    engine, colon, number = workers.partition(":")
    if engine != "ray" or (colon and not number.isdecimal()):
        raise ConfigError(f"{workers!r} is neither ray nor ray:<number of workers>.")
    if not name.startswith(LOCAL):
        raise ConfigError(
            f"Ray runs models of its own process, local/<id>, not {name}; leave it out, and set --threads."
        )
    return int(number) if number else None


def metric_of(name: str | None, program: dspy.Module) -> Any:
    """Return the metric named, or `FILE.py:NAME`; by default accuracy for labels, exact match for text.

    Raises:
        ConfigError: If there is no such file or name, or it can't be called.
    """
    if name is None:
        signature = predictors(program)[-1][1].signature
        return "accuracy" if is_direct(signature) and choices(signature) else "exact_match"
    if ".py:" not in name:
        return name
    found = _named(name, "a metric")
    if not callable(found):
        raise ConfigError(f"{name} is a {type(found).__name__}; a metric is a function of an example and a prediction.")
    return found


def budget_of(bounds: str | None, prices: Iterable[str], models: Iterable[str | None]) -> Budget:
    """Return a budget as it is written on the command line.

    Args:
        bounds: Of `--budget`.
        prices: Of `--price`.
        models: The names of those that may be asked.

    Raises:
        ConfigError: If the bounds or a price can't be read, or a price is of another model.
    """
    budget = Budget.parse(bounds) if bounds else Budget()
    priced, asked = dict(_price(text) for text in prices), list(dict.fromkeys(filter(None, models)))
    if unknown := [name for name in priced if name not in asked]:
        raise ConfigError(f"--price {unknown[0]}=...: no such model is asked here; {', '.join(asked)} is.")
    return dataclasses.replace(budget, prices=priced)


def _price(text: str) -> tuple[str, tuple[float, float]]:
    """Read `openai/x=0.5/1.5`."""
    model, rates = pair("--price", text)
    try:
        input_rate, output_rate = map(float, rates.split("/"))
    except ValueError as error:
        raise ConfigError(
            f"--price {text!r} is not MODEL=INPUT/OUTPUT in dollars per million tokens, as in openai/x=0.5/1.5."
        ) from error
    return model, (input_rate, output_rate)


def fields_of(program: dspy.Module, columns: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a program's input and label fields with their types.

    Inputs are what the program takes (see `taken`), but for those that `forward` can do without and that have no
    column. Labels are the last predictor's outputs that the data have a column for. If they have none, they are the
    columns left over where `forward` names its inputs, else all of the outputs.
    """
    is_named = names_inputs(program)
    inputs = {
        name: one.kind for name, one in taken(program).items() if one.is_needed or name in columns or not is_named
    }
    outputs = {name: field.annotation for name, field in predictors(program)[-1][1].signature.output_fields.items()}
    known = {name: kind for name, kind in outputs.items() if name in columns}
    if not known and is_named:
        known = {name: Any for name in columns if name not in inputs and name != "id"}
    return inputs, {name: _checked(kind) for name, kind in (known or outputs).items()}


def _checked(kind: Any) -> Any:
    """Return the type a label is checked against; what is left is left to the metric."""
    return kind if kind in (str, int, float, bool) or get_origin(kind) is not None or is_json(kind) else Any


def columns_of(given: Iterable[str] | None) -> dict[str, str]:
    """Read `--column text="Message Body"`, as often as given."""
    return pairs("--column", given)


def check_columns(columns: Mapping[str, str], *programs: dspy.Module) -> None:
    """Raise if a column is named for a field that no program has: a slip, of which nothing else would tell.

    Where `forward` names what it takes, a label may have any name.

    Raises:
        ConfigError: Naming the field.
    """
    known = dict[str, None]()
    for program in programs:
        if names_inputs(program):
            return
        for _, predictor in predictors(program):
            known |= dict.fromkeys(predictor.signature.fields)
    for field in columns:
        if field not in known:
            raise ConfigError(f"--column {field}={columns[field]}: the fields are {', '.join(known)}, not {field!r}.")


def rows_of(
    program: dspy.Module, source: str, *, part: str = "train", columns: Mapping[str, str] | None = None
) -> list[dspy.Example]:
    """Return a file's rows as examples of this program.

    Args:
        program: To be asked.
        source: Their place, as for `load_rows`.
        part: Of a folder or a hub id.
        columns: Field -> column, where the names differ.

    Raises:
        ConfigError: If a column is named for what is no field.
        DataError: Naming file, row and field.
    """
    check_columns(columns or {}, program)
    rows = load_rows(source, part=part, columns=columns)
    inputs, outputs = fields_of(program, rows[0])
    return examples(rows, inputs, outputs, source=source, columns=columns)
