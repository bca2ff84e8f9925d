"""`eval`, `show`, `diff` and `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import dspy
import typer
from dspy.utils.exceptions import AdapterParseError

from preceptor import program as artifact
from preceptor.cli.compiling import Json
from preceptor.cli.evaluating import Student, eval_, load
from preceptor.cli.inputs import lm_of
from preceptor.cli.view import counted, out, plain, print_diff, print_json, print_verdict, say
from preceptor.errors import ArtifactError, LMFailed
from preceptor.lm.dispatch import hide_secrets, reason
from preceptor.lm.seam import predictors
from preceptor.scoring.metrics import text_of

Program = Annotated[Path, typer.Argument(help="A saved program.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(eval_)
    app.command()(show)
    app.command("diff")(diff)
    app.command()(verify)


def show(program: Program, json: Json = False) -> None:
    """Print a saved program: what it does, its instructions and its evidence."""
    saved = artifact.read(program)
    if json:
        print_json({"program": saved.program, "evidence": saved.evidence})
        return
    console = out()
    console.print(plain(f"{saved.program['module']} on {saved.program['lm']}"))
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


def diff(before: Program, after: Program, json: Json = False) -> None:
    """Show how the instructions of two saved programs differ."""
    text = artifact.diff(artifact.read(before).instructions, artifact.read(after).instructions)
    if json:
        print_json({"equal": not text, "diff": text})
    else:
        print_diff(text or "The instructions are equal.")


def verify(
    program: Program,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    student: Student = None,
    json: Json = False,
) -> None:
    """Check a saved program: its hashes, then its recorded answers."""
    saved = artifact.read(program)
    loaded = load(program, student)
    say("  hashes hold")
    probes: list[dict[str, Any]] = saved.evidence.get("probes", [])
    model = lm_of(lm or str(saved.program["lm"]), api_base)
    with dspy.context(lm=model):
        answers = [_answer(loaded, probe) for probe in probes]
    changed = [
        {"inputs": probe["inputs"], "recorded": probe["answer"], "now": answer}
        for probe, answer in zip(probes, answers, strict=True)
        if probe["answer"] != answer
    ]
    if json:
        print_json({"hashes": True, "probes": len(probes), "changed": changed})
    else:
        text = f"{program} is whole; {len(probes) - len(changed)} of {len(probes)} recorded answers came again."
        out().print(plain(text), soft_wrap=True)
    if changed:
        raise ArtifactError(f"{len(changed)} recorded answers changed; the first was {changed[0]}.")


def _answer(program: dspy.Module, probe: Mapping[str, Any]) -> str:
    """Return what the program answers now, "" where its answer can't be read."""
    output = probe.get("output")
    if not isinstance(output, str):  # saved before it was recorded
        output = str(list(predictors(program)[-1][1].signature.output_fields)[-1])
    try:
        return text_of(program(**probe["inputs"]), output)
    except AdapterParseError:
        return ""
    except dspy.LMError as error:
        raise LMFailed(f"{reason(hide_secrets(error, dspy.settings.lm))}.") from None
