"""`preceptor bench engine`: rows per second beside llama.cpp and plain transformers, in one run.

All three score the same rows with the same prompts in this process, one after the other: ours packs rows
below a shared prefix; llama.cpp (xllamacpp, the same GGUF file, 4 slots, prompt cache) and
`transformers.generate` (left-padded batches of 16, the same weights) produce one token a row.

`prompts` reads what ProTeGi asks of a proposer in one round, four criticisms and their edits, in blocks and filled up.
`edits` decodes four edits one after the other, as a reflection is asked for: looking ahead, and one token a step.
`steps` decodes tokens of many texts at a time on a processor: as it is; with all keys and values copied at each token;
and so with plain layers, whose weights aren't laid out.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated, Any, Final, cast
from unittest.mock import patch

import dspy
import torch
import typer
from dspy.lm15 import Config, Message, Request, Response
from transformers import DynamicCache

from preceptor import demo
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.data import load_rows
from preceptor.errors import ConfigError
from preceptor.lm import ahead, attention, decoding, prefill, weights
from preceptor.lm.adapter import DirectAdapter, declare
from preceptor.lm.catalogue import lookup
from preceptor.lm.local import LocalEngine, LocalLM
from preceptor.lm.sampling import Draw
from preceptor.lm.seam import load_weights
from preceptor.teleprompters.protegi import EDIT, GRADIENT

TASKS: Final = {
    "subj": (
        "sentence -> kind: Literal['subjective', 'objective']",
        "Decide whether a sentence from a text about films is subjective or objective. Subjective sentences come from "
        "reviews: they judge, praise or blame, they tell how a film feels, they address the reader, and they may be "
        "ironic or use strong words and comparisons. Objective sentences come from plot summaries: they tell what "
        "happens to the characters, who they are, where they live and what they do next, without saying whether the "
        "film is good. If a sentence does both, ask what it is mainly there for. Look at the whole sentence, not at "
        "single words, before you decide which of the two it is.",
    ),
    "trec": (
        "sentence -> kind: Literal['description', 'entity', 'abbreviation', 'human', 'location', 'number']",
        "Decide what kind of answer a question asks for. description: a definition, a reason, a manner or any other "
        "longer explanation. entity: a thing, an animal, a food, a product, a colour, a language, a word or an event. "
        "abbreviation: a short form, or what a short form stands for. human: a person, a group, a title or a "
        "description of a person. location: a city, a country, a mountain, a state or any other place. number: a "
        "count, a date, a distance, a price, an age, a speed or any other quantity. Think of what would be written "
        "in the answer's place, not of the words in the question.",
    ),
    "tickets": (demo.SIGNATURE, demo.INSTRUCTIONS),
}
PARTS: Final = (*TASKS, "decoding", "prompts", "edits", "steps")
REASON: Final = (
    "The instructions don't say which queue takes the tickets that speak of a payment, a login or a delivery."
)
GROUPS, ERRORS = 4, 4
DECODED: Final = 64
LONG: Final = 200
STEPPED: Final = {"few_short": (8, 300), "many_long": (28, 1300)}
"""Texts whose steps are timed, and the tokens of the prompt of each."""

STEPS: Final = 10
SLOTS: Final = 4
BATCH: Final = 16


def run(
    model: Annotated[list[str] | None, typer.Option(help="Models of the catalogue.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds lmbff_16shot, for subj and trec.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to score.")] = 200,
    drafts: Annotated[int, typer.Option(help="Texts to decode.")] = 8,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure scoring and decoding."""
    found: list[dict[str, Any]] = []
    peak = matrix_rate()
    for name in model or ["smollm2-135m", "qwen2.5-coder-1.5b"]:
        lm = LocalLM(name)
        load_weights(lm)
        for each in task or _parts(lm, data_dir):
            others = {
                "decoding": partial(_decoded, name, lm, drafts),
                "prompts": partial(_prompts, lm),
                "edits": partial(_edits, lm),
                "steps": partial(_steps, name, lm),
            }
            measured = others.get(each) or partial(_scored, name, lm, each, data_dir, rows, peak)
            found.append({"model": name, "task": each, **measured()})
    result = {"cores": torch.get_num_threads(), "bf16_gflops": round(peak / 1e9), "rows": rows, "measured": found}
    give(result, out, as_json=as_json, show=_print)


def _parts(lm: dspy.LM, data_dir: Path | None) -> list[str]:
    """Return what is measured by default: what can be here."""
    scored = ["subj", "trec"] if data_dir else ["tickets"]
    model = cast("Any", lm.engine)._model
    able = {"edits": ahead.can_look(model), "steps": model.device.type == "cpu"}
    return [*scored, "decoding", "prompts", *(part for part, is_able in able.items() if is_able)]


def matrix_rate() -> float:
    """Return this machine's own bfloat16 matrix rate in operations per second: the best of 3 seconds."""
    a, b = torch.randn(1024, 1536, dtype=torch.bfloat16), torch.randn(8960, 1536, dtype=torch.bfloat16)
    best, end = 0.0, time.perf_counter() + 3
    while time.perf_counter() < end:
        seconds = _timed(lambda: torch.nn.functional.linear(a, b))[0]
        best = max(best, 2 * 1024 * 1536 * 8960 / seconds)
    return best


def _requests(lm: dspy.LM, task: str, data_dir: Path | None, count: int) -> list[Request]:
    if task not in TASKS:
        raise ConfigError(f"No task {task!r}; there are {', '.join(PARTS)}.")
    signature, instructions = TASKS[task]
    declared = declare(signature, instructions)
    [field] = declared.input_fields
    if task != "tickets" and data_dir is None:
        raise ConfigError(f"{task} needs --data-dir, the folder that holds lmbff_16shot.")
    path = demo.FOLDER / "test.csv" if data_dir is None else data_dir / "lmbff_16shot" / task / "test.tsv"
    texts = [str(row.get(field) or row.get("text")) for row in load_rows(path)[:count]]
    return [DirectAdapter().request(lm, {}, declared, [], {field: text}) for text in texts]


def _scored(name: str, lm: dspy.LM, task: str, data_dir: Path | None, rows: int, peak: float) -> dict[str, Any]:
    engine, requests = cast("LocalEngine", lm.engine), _requests(lm, task, data_dir, rows)
    _ours(engine, requests[:8])
    seconds, answers = _timed(lambda: _ours(engine, requests))
    alone_seconds, alone = _timed(lambda: [engine.complete(request).message.text for request in requests])
    prompts = [engine._prompt(request) for request in requests]
    fed = sum(len(prompt.suffix) for prompt in prompts) + len(prompts[0].prefix)
    plain_seconds, _ = _timed(lambda: _plain(engine, requests, 1))
    llama_seconds, _ = _llama(name, [_text(engine, request) for request in requests], 1)
    count = len(requests)
    return {
        "prompt_tokens": round(sum(prompt.length for prompt in prompts) / count),
        "own_tokens": round(sum(len(prompt.suffix) for prompt in prompts) / count),
        "ours": count / seconds,
        "llama_cpp": count / llama_seconds,
        "transformers": count / plain_seconds,
        "one_by_one": count / alone_seconds,
        "times_llama_cpp": llama_seconds / seconds,
        "times_transformers": plain_seconds / seconds,
        "equal_to_one_by_one": sum(a == b for a, b in zip(answers, alone, strict=True)) / count,
        "share_of_bf16_rate": 2 * _weights(engine) * fed / seconds / peak,
    }


def _decoded(name: str, lm: dspy.LM, drafts: int) -> dict[str, Any]:
    engine = cast("LocalEngine", lm.engine)
    texts = [row["text"] for row in load_rows(demo.FOLDER / "train.csv")[:drafts]]
    config = Config(max_tokens=DECODED, temperature=0.0)
    requests = [
        Request(model=lm.model, system="Answer the customer.", messages=(Message.user(text),), config=config)
        for text in texts
    ]
    seconds, answers = _timed(lambda: [r for batch in engine.batches(requests) for _, r in batch])
    tokens = sum(answer.usage.output_tokens for answer in answers)
    plain_seconds, plain = _timed(lambda: _plain(engine, requests, DECODED))
    llama_seconds, llama = _llama(name, [_text(engine, request) for request in requests], DECODED)
    return {
        "ours": drafts / seconds,
        "llama_cpp": drafts / llama_seconds,
        "transformers": drafts / plain_seconds,
        "times_llama_cpp": llama_seconds / seconds,
        "times_transformers": plain_seconds / seconds,
        "ours_tokens_per_second": tokens / seconds,
        "llama_cpp_tokens_per_second": llama / llama_seconds,
        "transformers_tokens_per_second": plain / plain_seconds,
    }


def _prompts(lm: dspy.LM) -> dict[str, Any]:
    """Read criticisms of tickets answered wrongly and then their edits, as a compile does; the better of two each."""
    engine = cast("LocalEngine", lm.engine)
    waves = [[engine._prompt(one) for one in _of_groups(lm, template, tokens=1)] for template in (GRADIENT, EDIT)]

    def in_blocks() -> None:
        blocks = prefill.Blocks(engine._model, 1 << 20, 384)
        for wave in waves:
            blocks.read([(*prompt.prefix, *prompt.suffix) for prompt in wave])

    def filled_up() -> None:
        for wave in waves:
            draws = [Draw(prompt.suffix, max_tokens=1) for prompt in wave]
            prefill.padded(engine._model, [engine._prefix(wave[0].prefix)] * len(draws), draws)

    with torch.inference_mode():
        ours, plain = (min(_timed(way)[0] for _ in range(2)) for way in (in_blocks, filled_up))
    return {
        "prompt_tokens": sum(prompt.length for wave in waves for prompt in wave),
        "seconds": ours,
        "seconds_filled_up": plain,
        "times_filled_up": plain / ours,
    }


def _edits(lm: dspy.LM) -> dict[str, Any]:
    """Decode edits for tickets answered wrongly one by one: looking ahead, then not."""
    engine = cast("LocalEngine", lm.engine)
    requests = _of_groups(lm, EDIT, tokens=LONG)
    if not ahead.can_look(engine._model):
        raise ConfigError("No looking ahead here: torch has no FBGEMM for this processor, or the model is on a GPU.")
    _one_by_one(engine, _of_groups(lm, EDIT, tokens=1))  # the prompts' common blocks are kept
    ours, texts = _timed(lambda: _one_by_one(engine, requests))
    with patch.object(ahead, "can_look", lambda model: False):
        plain, others = _timed(lambda: _one_by_one(engine, requests))
    return {
        "tokens": sum(text.usage.output_tokens for text in texts),
        "seconds": ours,
        "seconds_one_a_step": plain,
        "times_one_a_step": plain / ours,
        "equal_to_one_a_step": sum(a.message.text == b.message.text for a, b in zip(texts, others, strict=True)),
    }


def _steps(name: str, lm: dspy.LM) -> dict[str, Any]:
    """Return the seconds of a decoding step of few short and many long texts, three ways."""
    engine = cast("LocalEngine", lm.engine)
    if engine._model.device.type != "cpu":
        raise ConfigError("steps are timed on a processor only: on a GPU they are replayed graphs.")
    ours = {size: _step(engine, engine._model, *of) for size, of in STEPPED.items()}
    with patch.object(decoding, "_roomy", lambda cache: cache):
        copied = {size: _step(engine, engine._model, *of) for size, of in STEPPED.items()}
        with patch.multiple(weights, blocked=lambda model: model, prepacked=lambda model: model.float()):
            model = weights.read(name, weights.locate(name, None)[0]).eval()
        attention.use(model)
        plain = {size: _step(engine, model, *of) for size, of in STEPPED.items()}
    ways = {"": ours, "_copied": copied, "_plain": plain}
    return {f"{size}{way}": seconds for way, told in ways.items() for size, seconds in told.items()}


def _step(engine: LocalEngine, model: Any, texts: int, tokens: int) -> float:
    """Return the seconds of a step of so many texts, below one prompt of so many tokens; the mean of several."""
    known = engine._tokens(" ".join(row["text"] for row in load_rows(demo.FOLDER / "train.csv")))[:tokens]
    draws = {at: Draw(known, max_tokens=tokens, temperature=1.0, seed=at) for at in range(texts)}
    together = decoding.Together(model, ends=frozenset(), detokenize=engine._detokenize, is_open=True)
    with torch.inference_mode():
        together.join(prefill.padded(model, [DynamicCache(config=model.config)] * texts, [*draws.values()]), draws)
        together.step()
        return _timed(lambda: [together.step() for _ in range(STEPS)])[0] / STEPS


def _one_by_one(engine: LocalEngine, requests: Sequence[Request]) -> list[Response]:
    return [engine.complete(request) for request in requests]


def _of_groups(lm: dspy.LM, template: Template, tokens: int) -> list[Request]:
    """Return what ProTeGi asks about groups of tickets that were answered wrongly."""
    rows = load_rows(demo.FOLDER / "train.csv")
    errors = [f"Input: text: {row['text']}\nAnswer: queue: desk\nRight answer: {row['queue']}" for row in rows]
    groups = ["\n\n".join(errors[at * ERRORS : (at + 1) * ERRORS]) for at in range(GROUPS)]
    fields = {"prompt": demo.INSTRUCTIONS, "reason": REASON, "words": 60, "count": "one version"}
    asked = [template.substitute(fields, errors=group) for group in groups]
    config = Config(max_tokens=tokens)
    return [Request(model=lm.model, messages=(Message.user(text),), config=config) for text in asked]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _ours(engine: LocalEngine, requests: Sequence[Request]) -> list[str | None]:
    found = {index: answer for batch in engine.batches(requests) for index, answer in batch}
    return [cast("Any", found[index]).message.text for index in range(len(requests))]


def _text(engine: LocalEngine, request: Request) -> str:
    """Return a request's prompt as the model reads it."""
    prompt = engine._prompt(request)
    return str(engine._tokenizer.decode([*prompt.prefix, *prompt.suffix]))


def _plain(engine: LocalEngine, requests: Sequence[Request], tokens: int) -> int:
    """Generate with transformers as most people would; return the tokens generated."""
    made = 0
    tokenizer = engine._tokenizer
    tokenizer.padding_side = "left"
    for start in range(0, len(requests), BATCH):
        texts = [_text(engine, request) for request in requests[start : start + BATCH]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = engine._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        fresh = output[:, inputs["input_ids"].shape[1] :]
        made += int((fresh != tokenizer.pad_token_id).sum())
    return made


def _llama(name: str, prompts: Sequence[str], tokens: int) -> tuple[float, int]:
    """Complete with llama.cpp in this process; return seconds and tokens generated."""
    try:
        llama_cpp: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise ConfigError("The comparison needs xllamacpp: pip install 'preceptor[peers]'.") from error
    entry = lookup(name)
    params = llama_cpp.CommonParams()
    params.model.path = str(entry.folder / entry.weights)
    params.n_parallel, params.n_ctx, params.verbosity = SLOTS, 2048 * SLOTS, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = llama_cpp.Server(params)

    def complete(prompt: str) -> int:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": True}
        answer = server.handle_completions(asked)
        if "usage" not in answer:
            raise ConfigError(f"llama.cpp refused a prompt: {str(answer)[:200]}")
        return int(answer["usage"]["completion_tokens"])

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(complete, prompts[: 2 * SLOTS]))  # every slot reads the shared prefix once
        return _timed(lambda: sum(pool.map(complete, prompts)))


def _weights(engine: LocalEngine) -> int:
    """Return the parameters that take part in every token's matrix products."""
    layers = engine._model.named_modules()
    linear = (layer for name, layer in layers if ".layers." in name and isinstance(layer, torch.nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in linear)


def _print(result: dict[str, Any]) -> None:
    say(f"{result['cores']} cores, bf16 matrix rate {result['bf16_gflops']} GFLOP/s")
    columns = ["model", "task", "ours", "llama_cpp", "transformers", "times_llama_cpp", "times_transformers"]
    columns += ["equal_to_one_by_one", "share_of_bf16_rate", "prompt_tokens", "own_tokens"]
    _table(result, "Rows per second, in one run", columns, PARTS[:-3])
    columns = ["model", "prompt_tokens", "seconds", "seconds_filled_up", "times_filled_up"]
    _table(result, "Four criticisms and their edits, read in blocks and filled up", columns, ["prompts"])
    columns = ["model", "tokens", "seconds", "seconds_one_a_step", "times_one_a_step", "equal_to_one_a_step"]
    _table(result, "Four edits, one after the other: looking ahead, and one token a step", columns, ["edits"])
    columns = ["model", *(f"{size}{way}" for size in STEPPED for way in ("", "_copied", "_plain"))]
    _table(result, "Seconds of a decoding step: as it is, keys copied, layers plain too", columns, ["steps"])


def _table(result: dict[str, Any], title: str, columns: Sequence[str], parts: Sequence[str]) -> None:
    rows = [[row.get(column, "") for column in columns] for row in result["measured"] if row["task"] in parts]
    if rows:
        print_table(title, columns, rows)
