"""`eval`, `show`, `diff` and `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Final

import dspy
import typer
from dspy.utils.exceptions import AdapterParseError
from rich.text import Text
from rich.tree import Tree

from preceptor import program as artifact
from preceptor.cli.compiling import Json
from preceptor.cli.evaluating import Embedding, Student, eval_, load
from preceptor.cli.inputs import lm_named, lm_of
from preceptor.cli.planning import check_keys
from preceptor.cli.view import aside, counted, out, plain, print_diff, print_json, print_verdict, say, tell_fault
from preceptor.difference import compared
from preceptor.errors import ArtifactError, LMFailed
from preceptor.lineage import Descendant, descendants, folder_of
from preceptor.lm.dispatch import hide_secrets, reason
from preceptor.lm.seam import predictors
from preceptor.scoring.texts import text_of

_WIDTH: Final = 140
"""Characters of a text in the tree of a run's candidates; `--json` has the whole."""

Program = Annotated[Path, typer.Argument(help="A saved program.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(eval_)
    app.command()(show)
    app.command("diff")(diff)
    app.command()(verify)


def show(
    program: Annotated[Path, typer.Argument(help="A saved program; with --lineage its run folder too.")],
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Show which candidate of its run was made of which, and why.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a saved program: what it does, its instructions and its evidence."""
    if lineage:
        found = descendants(folder_of(program))
        print_json({"candidates": [asdict(one) for one in found]}) if json else _print_tree(found)
        return
    saved = artifact.read(program)
    if json:
        print_json({"program": saved.program, "evidence": saved.evidence})
        return
    console = out()
    console.print(plain(f"{saved.program['module']} on {saved.program['lm']}"))
    if saved.is_routed:
        console.print(plain(f"\nrouter: {saved.router}"), soft_wrap=True)
    for name, predictor in saved.program["predictors"].items():
        sides = [
            ", ".join(f"{field}: {info['type']}" for field, info in predictor[side].items())
            for side in ("inputs", "outputs")
        ]
        console.print(plain(f"\n{name}: {' -> '.join(sides)}\n{predictor['instructions']}\n"), soft_wrap=True)
        if predictor["demos"]:
            console.print(f"with {counted(len(predictor['demos']), 'demonstration')}\n")
    if "verdict" in saved.evidence:
        print_verdict(saved.evidence)


def _print_tree(found: Sequence[Descendant]) -> None:
    """Print every candidate below the one it was made of."""
    known = {one.key for one in found}
    children: dict[str, list[Descendant]] = {}
    for one in found:
        children.setdefault(one.parent if one.parent in known else "", []).append(one)
    for root in children.get("", []):
        tree = Tree(_label(root))
        waiting = [(root, tree)]
        while waiting:
            parent, node = waiting.pop()
            waiting += [(child, node.add(_label(child))) for child in children.get(parent.key, [])]
        out().print(tree)


def _label(one: Descendant) -> Text:
    """Return one candidate in two lines or three: its score, why it was made, and its instruction."""
    score = "not scored" if one.score is None else f"{one.score:.3f} on {counted(one.rows, 'row')}"
    head = [one.how, *([one.predictor] if one.predictor else []), score, *(["kept"] if one.is_kept else [])]
    texts = [one.instructions[one.predictor]] if one.predictor in one.instructions else list(one.instructions.values())
    lines = [", ".join(head), *([f"because: {one.because}"] if one.because else []), *texts]
    return plain("\n".join(shorten(line, _WIDTH, placeholder=" ...") for line in lines), "bold" if one.is_kept else "")


def diff(before: Program, after: Program, json: Json = False) -> None:
    """Show how two saved programs differ: instructions, fields, settings and demonstrations."""
    text = compared(artifact.read(before), artifact.read(after))
    if json:
        print_json({"equal": not text, "diff": text})
    else:
        print_diff(text or "The programs are equal.")


def verify(
    program: Program,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    student: Student = None,
    embedder: Embedding = None,
    json: Json = False,
) -> None:
    """Check a saved program: its hashes, then its recorded answers."""
    saved = artifact.read(program)
    with aside():
        loaded = load(program, student, embedder)
    say("  hashes hold")
    probes: list[dict[str, Any]] = saved.evidence.get("probes", [])
    model = lm_of(lm_named(saved, lm, api_base), api_base)
    if probes:
        check_keys(loaded, model)
    with aside(), dspy.context(lm=model):
        answers = [_answer(loaded, probe) for probe in probes]
    changed = [
        {"inputs": probe["inputs"], "recorded": probe["answer"], "now": answer}
        for probe, answer in zip(probes, answers, strict=True)
        if probe["answer"] != answer
    ]
    result = {"hashes": True, "probes": len(probes), "changed": changed}
    if not json:
        text = f"{program} is whole; {len(probes) - len(changed)} of {len(probes)} recorded answers came again."
        out().print(plain(text), soft_wrap=True)
    if changed:
        error = ArtifactError(f"{len(changed)} recorded answers changed; the first was {changed[0]}.")
        raise typer.Exit(tell_fault(error, result, as_json=json))
    if json:
        print_json(result)


def _answer(program: dspy.Module, probe: Mapping[str, Any]) -> str:
    """Return what the program answers now, "" where its answer can't be read."""
    output = probe.get("output")
    if not isinstance(output, str):  # saved before it was recorded
        output = str(list(predictors(program)[-1][1].signature.output_fields)[-1])
    try:
        return text_of(program(**probe["inputs"]), output)
    except AdapterParseError:
        return ""
    except TypeError as error:
        raise ArtifactError(
            f"{type(program).__name__} can't be called with the recorded inputs {', '.join(probe['inputs'])}: {error}. "
            "Pass the class that was compiled: --student FILE.py:NAME."
        ) from error
    except dspy.LMError as error:
        raise LMFailed(f"{reason(hide_secrets(error, dspy.settings.lm))}.") from None
