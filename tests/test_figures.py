"""The figures of the README and of seeds pages are those of the files under benchmarks/results, as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from preceptor.benchmarks.compared import HUMAN, PEERS, base, comparisons, duels, interval, made, means_by_task, mixed
from preceptor.benchmarks.papers import DEFAULT_METHODS
from preceptor.benchmarks.table import FOLDER, MARKS, asked, block, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
BENCHMARKS = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
TASKS = {"subj": "subj", "trec": "TREC"}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rate(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def scored() -> list[dict[str, Any]]:
    return [row for row in result("engine")["measured"] if row["task"] in TASKS]


@pytest.mark.parametrize("row", scored(), ids=lambda row: f"{row['model']}, {row['task']}")
def test_the_engine(row: dict[str, Any]) -> None:
    rates = [rate(row[name]) for name in ("ours", "llama_cpp", "transformers", "one_by_one")]
    shares = [f"{row[name]:.0%}".replace("%", " %") for name in ("equal_to_one_by_one", "share_of_bf16_rate")]
    cells = [f"{row['model']}, {TASKS[row['task']]}", row["own_tokens"], *rates, *shares]
    assert f"| {' | '.join(map(str, cells))} |" in README


def test_looking_ahead() -> None:
    [row] = result("engine-edits")["measured"]
    said = f"{row['times_one_a_step']:.1f} times as fast, the same texts"
    assert f"(`results/engine-edits.json`: `--model {row['model']} --task edits`, {said})" in BENCHMARKS
    assert row["equal_to_one_a_step"] == 4


def on_a_coin() -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("null-*.json")):
        for row in result(path.stem)["measured"]:
            found.setdefault(row["method"], {})[row["rows"]] = row
    return found


@pytest.mark.parametrize(("method", "rows"), on_a_coin().items())
def test_where_no_prompt_can_help(method: str, rows: dict[int, dict[str, Any]]) -> None:
    name = f"DSPy's {method.removeprefix('dspy.')}" if method.startswith("dspy.") else f"`{method}`"
    cells = [name]
    for size in (50, 200):
        cells += [f"{100 * rows[size]['share']:.1f} %", f"{100 * rows[size]['claimed']:+.1f}"]
    assert f"| {' | '.join(cells)} |" in README


def test_intervals_and_power() -> None:
    lines = result("coverage")["measured"]

    def shares(name: str) -> list[float]:
        return [100 * line[name] for line in lines if line[name] != "-"]

    gain, none, false, power = map(
        shares, ("gain covered", "no gain covered", "no gain confirmed", "smallest gain confirmed")
    )
    scores = shares("score covered")
    for told in (
        f"intervals of a gain cover {min(gain):.1f} to {max(gain):.1f} %,",
        f"where there is none {min(none):.1f} % or more",
        f"own score cover {min(scores):.1f} to {max(scores):.1f} %",
        f"no better is confirmed in {max(false):.1f} % at most",
        f"is found in {min(power):.1f} to {max(power):.1f} %",
        f"{result('coverage')['repeats']:,} repeats",
    ):
        assert told in README


def test_a_gain_that_is_there() -> None:
    shared, apart = result("effect")["measured"]
    assert (shared["agreement"], apart["agreement"]) == (0.5, 0.0)
    low, high = 100 * shared["share_low"], 100 * shared["share_high"]
    assert (
        f"APE takes it up in {shared['replaced']} of {shared['seeds']} runs ({100 * shared['share']:.1f} %, interval "
        f"{low:.1f} to {high:.1f}) where half of the rows share their luck under all prompts, in "
        f"{apart['replaced']} of {apart['seeds']} ({100 * apart['share']:.1f} %) where none does"
    ) in README
    claims = [f"{100 * row['claimed']:+.1f}" for row in (shared, apart)]
    truths = [f"{100 * row['true']:+.1f}" for row in (shared, apart)]
    assert f"claims {' and '.join(claims)} points where the returned programs gain {' and '.join(truths)}" in README


def test_no_budget_of_ours_was_passed() -> None:
    rows = [row for path in RESULTS.glob("budget*.json") for row in result(path.stem)["measured"]]
    ours = [row for row in rows if not row["method"].startswith("dspy.")]
    assert {row["method"] for row in ours} == {"ape", "constitutional_experts", "instruct_zero", "mixture", "protegi"}
    assert {row["over"] for row in ours} == {0}
    assert {row["threads"] for row in ours} == {1, 8, 64, 512}
    assert {row["end"] for row in ours} <= {"whole search", "search cut short", "refused"}
    assert "0 calls, tokens or dollars over in all of ours" in README


def test_every_killed_run_ended_in_the_same_program() -> None:
    rows = [row for path in RESULTS.glob("kill*.json") for row in result(path.stem)["measured"]]
    assert {row["method"] for row in rows} >= {"ape", "constitutional_experts", "instruct_zero", "mixture", "protegi"}
    for row in rows:
        assert row["kills"] == 30
        assert row["identical"] == row["same_calls"] == row["runs"]
        assert row["recorded_and_asked_again"] == 0
        assert row["most_in_flight"] <= row["threads"]


def test_what_a_row_costs() -> None:
    costs = {(row["threads"], row["rows"]): row for row in result("overhead")["cost"]}
    for threads in (1, 8, 32):
        cells = [
            ", ".join(f"{costs[threads, rows][f'{name} us']:,.0f}" for rows in (1000, 16_000))
            for name in ("ours", "dspy chat")
        ]
        assert f"| {threads} | {' | '.join(cells)} |" in README


def test_the_share_of_the_ideal() -> None:
    rows = result("overhead-waiting")["waiting"]
    assert [row["in flight"] for row in rows] == [32, 128, 512]
    first, second, third = [f"{100 * row['ours share']:.0f}" for row in rows]
    assert f"ours reaches {first}, {second} and {third} % of the ideal with 32, 128 and 512" in README


def test_what_is_served() -> None:
    found = result("serve")
    [waiting], [ours, recipe], memory = found["waiting"], found["instant"], found["memory"]
    assert waiting["requests/s"] > 150
    assert f"{waiting['requests/s']:.0f} requests a second of the ideal's 160, 99 in 100 within" in README
    assert f"within {waiting['p99 ms']:.0f} ms" in README
    rates = f"{ours['requests/s']:,.0f} a second, the plain FastAPI recipe {recipe['requests/s']:,.0f} in the same run"
    assert rates in README
    assert {f"{row['MB']:.0f}" for row in memory} == {"394"}
    assert (memory[0]["requests"], memory[-1]["requests"]) == (10_000, 100_000)
    assert "394 MB after 10,000 requests and after 100,000" in README


def test_what_a_batch_takes() -> None:
    found = result("batch")
    first, last = found["linear"][0], found["linear"][-1]
    rates = f"{first['rows_a_second']:,.0f} rows a second at 10,000 rows and {last['rows_a_second']:,.0f} at 100,000"
    assert f"{rates}, {max(row['peak_megabytes'] for row in found['linear']):.0f} MB at most" in README
    [killed] = found["kills"]
    assert (killed["kills"], killed["answered"], killed["identical"]) == (20, 20_000, True)
    [spread] = result("batch-ray")["ray"]
    assert spread["identical"]
    assert f"two workers makes {spread['ratio']:.2f} times the rate" in README


def test_what_regions_take() -> None:
    found = result("regions")
    rows = {
        row["contender"]: (f"{row['distance']:.3f}".lstrip("0"), f"{row['seconds']:.0f}") for row in found["clustering"]
    }
    ours, sampled, whole, other = (rows[name] for name in ("ours", "faiss", "faiss, all", "scikit-learn"))
    assert f"{ours[0]} from their centroids on average (1 - cos), in {ours[1]} s" in README
    assert f"own sample {sampled[0]} in {sampled[1]} s, on all rows {whole[0]} in {whole[1]} s" in README
    assert f"MiniBatchKMeans {other[0]} in {other[1]} s" in README
    routing = found["routing"]
    assert f"{routing['embedding ms']:.1f} ms to embed and {routing['search ms']:.2f} ms to route" in README


def test_what_samplers_gain_over_random_points() -> None:
    rows = {row["sampler"]: row for row in result("samplers")["measured"] if row["function"] == "all three"}
    ours, tpe = (
        [f"{100 * rows[name][f'over random{end}']:.1f}" for end in ("", " low", " high")]
        for name in ("coupled", "optuna TPESampler")
    )
    assert f"on {rows['coupled']['searches']} made-up searches" in README
    assert f"{ours[0]} points better than random ones' best ({ours[1]} to {ours[2]})" in README
    assert f"TPESampler {tpe[0]} ({tpe[1]} to {tpe[2]})" in README


def page(name: str) -> str:
    return (ROOT / "seeds" / f"{name}.md").read_text(encoding="utf-8")


def bandits() -> list[dict[str, Any]]:
    return list(result("bandits")["measured"])


@pytest.mark.parametrize("row", bandits(), ids=lambda row: f"{row['rule']}, {row['prompts']}, {row['rows each']}")
def test_how_often_a_rule_picks_the_best(row: dict[str, Any]) -> None:
    if not row["rule"].startswith("published"):
        assert row["over uniform"] >= 0.0  # at every budget and number of prompts
    ends = [f"{row[name]:.3f} ({row[f'{name} low']:.3f} to {row[f'{name} high']:.3f})" for name in ("picked",)]
    name = "over uniform"
    over = f"{row[name]:+.3f} ({row[f'{name} low']:+.3f} to {row[f'{name} high']:+.3f})"
    cells = [row["prompts"], row["rows each"], row["rule"], *ends, "" if row["rule"] == "uniform" else over]
    assert f"| {' | '.join(map(str, cells))} | {row['in beam']:.3f} |" in page("protegi")


@pytest.mark.parametrize("row", [row for row in result("preview")["measured"] if row["rule"] == "ucb"])
def test_what_a_preview_of_successors_adds(row: dict[str, Any]) -> None:
    points = [
        f"{100 * row[name]:+.1f} ({100 * row[f'{name} low']:+.1f} to {100 * row[f'{name} high']:+.1f})"
        for name in ("better pick", "better beam")
    ]
    picked = [f"{row[way]:.3f}" for way in ("random", "preview")]
    cells = [f"{row['agreement']:.1f}", row["parents"], row["rows each"], *picked, *points]
    assert f"| {' | '.join(map(str, cells))} |" in page("protegi")


def searches() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result("samplers")["measured"]
    return rows


@pytest.mark.parametrize("row", searches(), ids=lambda row: f"{row['function']}, {row['sampler']}, {row['searches']}")
def test_how_good_a_samplers_pick_is(row: dict[str, Any]) -> None:
    def ranged(name: str, sign: str = "") -> str:
        return "{} ({} to {})".format(
            *(f"{row[f'{name}{end}']:{sign}.3f}".replace("0.", ".") for end in ("", " low", " high"))
        )

    over = "" if row["sampler"] == "random" else ranged("over random", "+")
    cells = [row["function"], row["sampler"].replace("optuna", "Optuna"), f"{row['searched']:.3f}".lstrip("0")]
    cells += [ranged("true"), ranged("rescored"), over, f"{row['distinct']:.0%}".replace("%", " %")]
    assert f"| {' | '.join(cells)} | {row['seconds']:.1f} |" in page("instructzero")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the options and the text of each table of methods and tasks, its two comments included."""
    begun = "([^\n]+)".join(map(re.escape, MARKS[0].split("{}")))
    found = re.finditer(f"{begun}.*?{re.escape(MARKS[1])}", text, flags=re.DOTALL)
    return [(one[1], one[0]) for one in found]


def test_tables_of_methods_and_tasks_are_those_of_their_groups_byte_for_byte() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(blocks(text)) == text.count(MARKS[1]) == text.count(MARKS[0].partition("{}")[0])
    for options, told in blocks(text):
        given = options.split()
        of: dict[str, list[str]] = {}
        for name, value in zip(given[::2], given[1::2], strict=True):
            of.setdefault(name, []).append(value)
        [group], [folder], tasks = of["--group"], of.get("--folder", [""]), of.get("--task", [])
        runs = read((ROOT / folder if folder else FOLDER) / group)
        assert told == block(options, [run for run in runs if not tasks or run["task"] in tasks])


def test_a_table_of_methods_and_tasks_is_found_where_it_stands() -> None:
    [place, *_] = [place for place in sorted(FOLDER.iterdir()) if place.is_dir()]
    options = asked(FOLDER, place.name, [])
    told = block(options, read(place))
    assert blocks(f"# Measured\n\n{told}\n\nText.\n\n{told}\n") == [(options, told)] * 2
    assert blocks(told.replace("0.", "1.")) != [(options, told)]


def test_what_is_said_of_the_table_of_methods() -> None:
    found = [run for run in read(FOLDER / "qwen2.5-coder-1.5b-600") if run["method"] != HUMAN]
    runs = made(found)
    assert f"{sum(run['replaced'] for run in runs)} of {len(runs)} compiles changed the prompt" in README
    assert {gain for gaps in mixed(runs, "compiled").values() for gain in gaps.values()} == {0.0}
    confirmed = sorted(run["confirm_rows"] for run in runs)
    assert f"{confirmed[0]} to {confirmed[-1]} rows to confirm on" in README
    refused = [run for run in found if run.get("refused")]
    assert [(run["method"], run["task"], run["confirm_rows"]) for run in refused] == 2 * [
        ("ape+mixture", "tickets", 150)
    ]
    assert {run["device"] for run in runs} == {"NVIDIA H200"}


def test_what_a_compile_takes_on_two_cores() -> None:
    runs = read(RESULTS / "papers-two-cores" / "qwen2.5-coder-1.5b-600")
    compiles = {(run["task"], run["seed"]): run for run in runs if run["method"] == "protegi"}
    assert {run["budget"] for run in runs} == {600}
    assert compiles["trec", 0]["replaced"] is False
    quiet, again, ethos = compiles["trec", 0], compiles["trec", 1], compiles["ethos", 1]
    assert f"in float32: {quiet['seconds']} s, the prompt kept ({quiet['calls']} calls;" in page("protegi")
    assert f"TREC {again['seconds']} s ({again['calls']} calls, seed 1)" in page("protegi")
    assert f"ETHOS {ethos['seconds']} s ({ethos['calls']} calls, seed 1)" in page("protegi")
    assert f"ETHOS took {compiles['ethos', 0]['seconds']} s" in page("protegi")


def test_what_is_said_of_the_runs_in_bfloat16() -> None:
    runs = read(RESULTS / "papers-bfloat16" / "qwen2.5-coder-1.5b-600")
    assert {run["device"] for run in runs} == {"cpu, x86_64, bfloat16"}
    first = [run for run in runs if (run["method"], run["seed"]) == ("protegi", 0)]
    compiles = {run["task"]: run for run in first if run["task"] != "tickets"}
    assert not any(run["replaced"] for run in compiles.values())
    told = {task: f"{compiles[task]['seconds']} s ({compiles[task]['calls']} calls)" for task in compiles}
    assert (
        f"TREC {told['trec']}, ETHOS {told['ethos']}, subj {told['subj']} and antonyms {told['antonyms']}, "
        "the prompt kept each time"
    ) in page("protegi")
    assert max(run["seconds"] for run in compiles.values()) <= 480
    plain, labels = ([run for run in runs if run["method"] == name] for name in ("ape", "ape:mode=labels,few_shot=8"))
    announced = [run for run in (*plain, *labels) if run["task"] in ("agnews", "liar", "openai_moderation")]
    assert len(announced) == 12
    lines = [line for line in page("ape").splitlines() if line.startswith(("| agnews, ", "| liar, ", "| openai_mod"))]
    assert lines == [announced_line(announced, task) for task in ("agnews", "liar", "openai_moderation")]
    [duel] = [line for line in duels(announced) if line["method"] == "ape"]
    text, gain = " ".join(page("ape").split()), [-100 * duel[name] for name in ("gain", "high", "low")]
    assert f"{gain[0]:+.1f} points ({gain[1]:+.1f} to {gain[2]:+.1f}, {duel['tasks']} tasks;" in text
    assert gain[1] < 0 < gain[2], "so the defaults stay"
    liar = [run for run in labels if run["task"] == "liar"]
    macro = [f"{value:.3f}"[1:] for value in (liar[0]["seed_f1"], *(run["compiled_f1"] for run in liar))]
    assert f"macro F1 goes from {macro[0]} to {macro[1]} and {macro[2]}" in text


def announced_line(runs: list[dict[str, Any]], task: str) -> str:
    """Return the line of a task in the test announced in seeds/ape.md."""
    words = {(True, True): "both confirmed", (False, False): "kept twice"}
    cells: list[str] = []
    for method in ("ape", "ape:mode=labels,few_shot=8"):
        own = sorted(
            (run for run in runs if (run["task"], run["method"]) == (task, method)), key=lambda run: run["seed"]
        )
        scores = [f"{run['compiled']:.3f}"[1:] for run in own]
        one, other = (bool(run["replaced"]) for run in own)
        alike = f"{scores[0]}, {scores[1]} ({words.get((one, other))})"
        apart = [
            f"{score} ({'confirmed' if done else 'kept'})" for score, done in zip(scores, (one, other), strict=True)
        ]
        cells.append(alike if one == other else ", ".join(apart))
    first = next(run for run in runs if run["task"] == task)
    metric = {"f1:yes": "F1 of `yes`"}.get(first["metric"], first["metric"])
    return f"| {task}, {metric} | {first['seed_score']:.3f} | {cells[0]} | {cells[1]} |".replace("| 0.", "| .")


def test_what_is_said_of_the_runs_on_two_cores() -> None:
    runs = read(RESULTS / "papers-two-cores" / "qwen2.5-coder-1.5b-600")
    done = [run for run in runs if run["task"] in ("trec", "ethos") and run["method"] in DEFAULT_METHODS]
    [replaced] = [run for run in done if run["replaced"]]
    assert (len(done), replaced["method"], replaced["task"], replaced["seed"]) == (12, "ape", "ethos", 1)
    told = [
        f"F1 {replaced['seed_score']:.3f} to {replaced['compiled']:.3f}",
        f"({100 * replaced['gain']:+.1f} points, {100 * replaced['low']:+.1f} to {100 * replaced['high']:+.1f})",
    ]
    for method in DEFAULT_METHODS:
        gains = [100 * run["candidate_gain"] for run in done if run["method"] == method]
        low, high = interval(gains)
        told.append(f"{sum(gains) / len(gains):+.1f} ({low:+.1f} to {high:+.1f})")
    made = {(run["task"], run["method"], run["seed"]): run for run in runs}
    assert not any(made["antonyms", "protegi", seed]["replaced"] for seed in (0, 1))
    assert made["antonyms", "protegi", 0]["candidate_gain"] == 0
    told.append(f"held for best with seed 1 has {made['antonyms', 'protegi', 1]['candidate']:.3f}")
    assert not any(run["replaced"] for run in runs if run["task"] == "subj")
    sentences = {
        "ape": "best has {} and {} on the test rows",
        "instruct_zero": "held {} and {}",
        "protegi": "held {}, the prompt itself, and {}",
    }
    for method, sentence in sentences.items():
        told.append(sentence.format(*(f"{made['subj', method, seed]['candidate']:.3f}" for seed in (0, 1))))
    first, second = (made["antonyms", "ape", seed] for seed in (0, 1))
    assert first["replaced"]
    assert second["replaced"]
    scores = (first["seed_score"], first["compiled"], second["compiled"])
    told.append("APE went from {:.3f} to {:.3f} and {:.3f}, both".format(*scores))
    soft = [made["antonyms", "instruct_zero", seed] for seed in (0, 1)]
    assert [run["replaced"] for run in soft] == [True, False]
    told.append(f"InstructZero to {soft[0]['compiled']:.3f}, confirmed, and kept the prompt once")
    assert [text for text in told if text not in BENCHMARKS] == []


def told_of(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return a run's line of a table: what was kept, and what the search held for best, on the test rows."""
    scores = [f"{run[name]:.3f}" for name in ("seed_score", "compiled")]
    held = "not scored | "  # demonstrations that were not confirmed: their text is not all of them
    if "candidate" in run:
        gain, low, high = (f"{100 * run[name]:+.1f}" for name in ("candidate_gain", "candidate_low", "candidate_high"))
        is_own = run.get("best_candidate") == made_with(run, runs) and "best_demos" not in run
        held = f"{run['candidate']:.3f} | " + ("the prompt itself" if is_own else f"{gain} ({low} to {high})")
    return f"| {run['task']} | {run['method']} | {run['seed']} | {' | '.join(scores)} | {held} | {run['calls']} |"


def made_with(run: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the instructions that a run began with: those of another run of its task that kept them."""
    return dict(next(one for one in runs if one["task"] == run["task"] and not one["replaced"])["instructions"])


def of_peers_and_principles(folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs of a folder in question, in the order of a table, and its lines."""
    every = read(RESULTS / folder / "qwen2.5-coder-1.5b-600")
    told = {*PEERS, "constitutional_experts", *(["protegi"] if folder == "papers-bfloat16" else [])}
    runs = [run for run in every if base(run["method"]) in told]
    order = sorted(runs, key=lambda run: (run["task"], run["method"], run["seed"]))
    return order, [told_of(run, every) for run in order]


@pytest.mark.parametrize(("place", "folder"), [(1, "papers-two-cores"), (2, "papers-bfloat16")])
def test_the_runs_of_peers_and_constitutional_experts_on_two_cores(place: int, folder: str) -> None:
    runs, lines = of_peers_and_principles(folder)
    head = "| task | method | seed | the prompt | compiled | held for best | its gain, in points | calls |"
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split(head)[place].split("\n\n")[0]
    assert table.strip().splitlines()[1:] == lines
    replaced = sum(run["replaced"] for run in runs)
    assert f"{len(runs)} compiles so far, of which {replaced or 'none'} replaced the prompt" in BENCHMARKS


def test_what_demonstrations_do_for_constitutional_experts() -> None:
    runs, _ = of_peers_and_principles("papers-bfloat16")
    names = ("constitutional_experts", "constitutional_experts:few_shot=0")
    runs = [run for run in runs if run["seed"] == 0 and run["method"] in names]
    of = {(run["task"], run["method"].partition(":")[2]): run for run in runs}
    lines: list[str] = []
    for task, score in (("ethos", "F1"), ("trec", "accuracy"), ("tickets", "accuracy")):
        plain, shown = of[task, "few_shot=0"], of[task, ""]
        lines.append(f"| {task}, {score} | {plain['seed_score']:.3f} | {verdict(plain)} | {verdict(shown)} |")
        assert shown["instructions"] == made_with(plain, runs), "all of the gain is the demonstrations'"
    table = page("constitutional_experts").split("| task | the prompt | without | with eight |")[1].split("\n\n")[0]
    assert table.strip().splitlines()[1:] == lines


def test_what_the_announced_test_of_demonstrations_has_come_to() -> None:
    runs, _ = of_peers_and_principles("papers-bfloat16")
    names = ("agnews", "liar", "openai_moderation", "sst-2", "subj")
    plain = "constitutional_experts:few_shot=0"
    own = [run for run in runs if run["task"] in names and run["method"] in ("constitutional_experts", plain)]
    of = {(run["task"], run["seed"], run["method"]): run for run in own}
    pairs = [(run, of[task, seed, "constitutional_experts"]) for (task, seed, name), run in of.items() if name == plain]
    assert len(own) == 2 * len(pairs) == 20
    told = page("constitutional_experts").partition("Announced before it was run:")[2]
    [duel] = duels(own)
    gain, low, high = (100 * duel[name] for name in ("gain", "rows_low", "rows_high"))
    assert f"The mean gap is {gain:+.1f} points, over test rows {low:+.1f} to {high:+.1f}" in " ".join(told.split())
    assert low > 0
    assert duel["losses"] == 0, "no task's mean falls"
    table = told.split("| task | seed | the prompt | without | with eight |")[1].split("\n\n")[0]
    assert table.strip().splitlines()[1:] == [
        f"| {one['task']} | {one['seed']} | {one['seed_score']:.3f} | {verdict(one)} | {verdict(shown)} |"
        for one, shown in pairs
    ]


def verdict(run: dict[str, Any]) -> str:
    """Return the score of what a compile gave back, and whether that is new."""
    gain, low, high = (f"{100 * run[name]:+.1f}" for name in ("gain", "low", "high"))
    return f"{run['compiled']:.3f}, {gain} ({low} to {high})" if run["replaced"] else "kept"


def test_what_is_said_beside_dspys_optimizers() -> None:
    every = made(read(RESULTS / "papers-bfloat16" / "qwen2.5-coder-1.5b-600"))
    runs = [run for run in every if run["task"] in ("agnews", "ethos", "liar", "tickets", "trec")]
    replaced = [run for run in runs if run["replaced"]]
    [other] = [run for run in replaced if base(run["method"]) in PEERS]
    assert (other["method"], other["task"]) == ("gepa+mixture", "ethos")
    assert {base(run["method"]) for run in replaced} == {"ape", "constitutional_experts", "gepa"}
    assert f"{len(replaced)} of these {len(runs)} compiles changed the prompt" in README
    of = {(line["method"], line["against"]): line for line in duels(runs)}
    told = "{:+.1f} points ({:+.1f} to {:+.1f} over test rows of these tasks, {:+.1f} to {:+.1f} over {} tasks)"
    for peer, words in (("copro", "ahead of COPRO by "), ("gepa", "of GEPA by "), ("gepa+mixture", "in a mixture by ")):
        line = of["constitutional_experts", peer]
        ends = [100 * line[name] for name in ("gain", "rows_low", "rows_high", "low", "high")]
        assert words + told.format(*ends, line["tasks"]) in README
    [line] = [line for line in comparisons(runs) if line["comparison"].startswith("constitutional_experts against the")]
    ends = [100 * line[name] for name in ("gain", "low", "high")]
    mean = "{:+.1f} points ({:+.1f} to {:+.1f} over {} tasks)".format(*ends, line["tasks"])
    assert f"of the mean peer by {mean}" in README
    assert f"the mean peer by {mean} in macro F1 (README)" in page("constitutional_experts")
    plain = [run for run in runs if run["method"] == "constitutional_experts:few_shot=0"]
    gain = fmean(means_by_task(plain, lambda run: run["compiled"] - run["seed_score"]))
    assert f"Without its demonstrations it gains {100 * gain:+.1f}." in README
    added = mixed(runs, "compiled")
    means = {method: 100 * fmean(gaps.values()) for method, gaps in added.items()}
    assert (means["constitutional_experts"], means["protegi"]) == (0, 0)
    assert f"added 0.0 to ConstitutionalExperts and 0.0 to ProTeGi, {means['gepa']:+.1f} to GEPA" in README
    assert f"it adds 0.0 points to this and to ProTeGi and {means['gepa']:+.1f} to GEPA" in page(
        "constitutional_experts"
    )


def test_what_is_said_of_instruct_zero_redrawn() -> None:
    runs = read(RESULTS / "papers-two-cores" / "qwen2.5-coder-1.5b-600")
    of = {(run["task"], run["method"]): run for run in runs if run["seed"] == 0}
    redrawn, ape = of["antonyms", "instruct_zero:redraw=true"], of["antonyms", "ape"]
    assert redrawn["device"] == ape["device"]
    scores = [f"{run[name]:.3f}".lstrip("0") for run, name in ((redrawn, "seed_score"), (redrawn, "compiled"))]
    assert f"antonyms {' -> '.join(scores)} on test rows, confirmed" in page("instructzero")
    assert f"on the same 2 cores, came to {ape['compiled']:.3f}".replace("0.", ".") in page("instructzero")
