"""The report of a run: one page without scripts or requests, written from the files of the run folder alone.

The page lies beside the program, not in it: it shows rows of the user's data, which needn't go where the program
goes, and what was billed and how long it took, which differ from run to run of the same compile.
"""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from preceptor import difference
from preceptor.errors import RunError
from preceptor.lineage import key_of
from preceptor.report import candidates, curves, errors, places, repeat
from preceptor.report.folder import Findings, Search, findings
from preceptor.routed import DEFAULT
from preceptor.untrusted import spelt_out

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

REPORT: Final = "report.html"


@contextmanager
def reported(folder: Path) -> Generator[None]:
    """Write a run's report when what is done inside ends, or stops before there ever was a result.

    A report that can't be written is told of in the log; the run stands without it.
    """
    ended = False
    try:
        yield
        ended = True
    finally:
        if ended or not (folder / "result.json").is_file():
            _written(folder)


def _written(folder: Path) -> None:
    try:
        write(folder, folder / REPORT)
    except (OSError, RunError) as error:
        logger.warning("The report of %s can't be written: %s", folder, error)
    except Exception:  # a fault of the page's own costs no finished compile
        logger.exception("The report of %s can't be written", folder)


def write(folder: Path, path: Path) -> None:
    """Write the report of a run folder, whole or not at all.

    Raises:
        RunError: If the folder is no run folder, or a file of it is damaged.
        OSError: If the page can't be written.
    """
    text = page(folder)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def page(folder: Path) -> str:
    """Return the report of a run folder, as HTML.

    Raises:
        RunError: If the folder is no run folder, or a file of it is damaged.
    """
    found = findings(folder)
    return _environment().get_template("page.html").render(_view(found))


def _view(found: Findings) -> dict[str, Any]:
    """Return what the page shows, by the names it uses."""
    result = found.result
    roles = [(search, _roles(found, search)) for search in found.searches]
    tables = [candidates.table(search, known) for search, known in roles]
    lineages = [(search.name, candidates.lineage(search, known)) for search, known in roles]
    drawn = [(search.name, curves.chart(search, {} if search.name else result)) for search in found.searches]
    asked = found.known.get("command")
    return {
        "style": (Path(__file__).parent / "style.css").read_text(encoding="utf-8"),
        "result": result,
        "headline": _headline(result),
        "has_candidate": bool(result) and (result["replaced"] or result.get("has_candidate", True)),
        "charts": [(name, one) for name, one in drawn if one is not None],
        "frame": curves.FRAME,
        "is_shown": any(one.demos for search in found.searches for one in search.scored[:1]),
        "size": (places.WIDTH, places.HEIGHT),
        "marks": places.MARKS,
        "changes": _changes(found),
        "map": places.mapped(found),
        "groups": errors.groups(found.rows),
        "has_experts": any(not row.measures for row in found.rows),
        "tables": [one for one in tables if one is not None],
        "lineages": [(name, births) for name, births in lineages if births],
        "command": repeat.command({**asked, "run": str(found.folder)}) if isinstance(asked, dict) and asked else "",
        "resume": f"preceptor resume {shlex.quote(str(found.folder))}",
        "fingerprints": found.known.get("fingerprints", {}),
        "folder": str(found.folder),
    }


def _headline(result: Mapping[str, Any]) -> str:
    if not result:
        return "Not finished: nothing has been confirmed yet"
    if not result["replaced"]:
        return "Kept: your instructions stay"
    return f"Replaced: {100 * result['gain']:+.1f} points"


def _roles(found: Findings, search: Search) -> dict[str, str]:
    """Return what became of a search's candidates, by the keys of their instructions."""
    if search.name:
        own = found.candidates.get(search.name)
        began, ended = "default", "expert"
    else:
        own = found.candidates.get("") or found.candidates.get(DEFAULT)
        began, ended = "yours", "compiled" if found.result.get("replaced") else "best candidate"
    last = {key_of(own): ended} if own else {}
    for one in search.scored[:1]:
        if not one.demos:
            return {**last, key_of(one.instructions): began}
        return {key_of(one.instructions): f"{began}, with demonstrations", **last}  # all candidates have them
    return last


def _changes(found: Findings) -> list[tuple[str, list[difference.Edit]]]:
    """Return what the winner changes in the user's instructions: predictor by predictor, where it changes any."""
    result = found.result
    if not result:
        return []
    before, after = result["seed_instructions"], result["instructions"]
    if not result["replaced"] and len(found.candidates) == 1:
        [after] = found.candidates.values()
    names = [name for name in {**before, **after} if before.get(name, "") != after.get(name, "")]
    return [(name, difference.edits(before.get(name, ""), after.get(name, ""))) for name in names]


@functools.cache
def _environment() -> Environment:
    """Return Jinja's environment, which `import preceptor` doesn't wait for."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    filters: dict[str, Any] = made.filters
    filters.update(score=_score, points=_points, shorten=_shorten)
    return made


def _finalized(value: Any) -> Any:
    """Return what is put on the page: of a text, with the characters spelt out that would not be seen."""
    return spelt_out(value) if type(value) is str else value


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _points(gain: float | None) -> str:
    return "" if gain is None else f"{100 * gain:+.1f}"


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} …"
