"""A compile in its own process, killed for real."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dspy
import pytest

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
"""On a busy machine several threads of torch spin for each other 20 times longer than they work."""


def arguments(rows: Path, run: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "preceptor", "compile", "text -> label: Literal['spam', 'mail']"),
        *("--instructions", "Sort.", "--data", str(rows), "--lm", "local/smollm2-135m", "--run", str(run)),
        *("--set", "candidates=3", "--set", "max_tokens=12", "--budget", "calls=300", "--json"),
    ]


def finished(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=ALONE)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def answers(run: Path) -> int:
    ledger = run / "ledger.sqlite"
    if not ledger.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    texts = [f"{'Win a prize' if n % 2 else 'Lunch at noon'} {n}" for n in range(80)]
    lines = [f"{text},{'spam' if n % 2 else 'mail'}" for n, text in enumerate(texts)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


def test_a_killed_compile_resumes_to_the_same_program_and_bills_no_call_twice(
    rows: Path, tmp_path: Path, smollm: dspy.LM
) -> None:
    whole = finished(arguments(rows, tmp_path / "whole"))

    killed = tmp_path / "killed"
    child = subprocess.Popen(
        arguments(rows, killed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=ALONE,
    )
    while answers(killed) < 20 and child.poll() is None:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    kept = answers(killed)
    assert 20 <= kept < whole["calls"]

    resumed = finished([sys.executable, "-m", "preceptor", "resume", str(killed), "--json"])

    for name in ("program.json", "evidence.json", "manifest.json"):
        assert (killed / "program" / name).read_bytes() == (tmp_path / "whole" / "program" / name).read_bytes()
    assert resumed["calls"] == whole["calls"]
    assert resumed["billed_calls"] + kept == answers(killed) == answers(tmp_path / "whole")


def hear_interrupts() -> None:
    """Undo what a shell does to the commands it runs in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(rows: Path, tmp_path: Path, smollm: dspy.LM) -> None:
    child = subprocess.Popen(
        [*arguments(rows, tmp_path / "run"), "--set", "candidates=30", "--budget", "calls=5000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
        env=ALONE,
    )
    while answers(tmp_path / "run") < 4 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, message = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Interrupted. What was answered is kept" in message
