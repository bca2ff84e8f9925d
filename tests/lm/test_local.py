"""The in-process engine: many requests at once answer as each would alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.lm15 import Config, ImagePart, Message, Request, Response, TokenLogprob

import preceptor
from preceptor.errors import ConfigError, InputTooLong, ModelError
from preceptor.lm import decoding
from preceptor.lm.catalogue import lookup
from preceptor.lm.local import LocalEngine, branch_texts
from preceptor.lm.seam import mean_log_probability

SYSTEM = "Say whether the review is good or bad."
NOUNS = ("film", "soup", "chair", "concert", "hotel", "phone", "garden", "novel")
VERDICTS = ("was wonderful", "broke at once", "left me cold", "is the best I know", "was a waste of money")
REVIEWS = [f"The {noun} {verdict}." for noun in NOUNS for verdict in VERDICTS]


def request(text: str, *, system: str | None = SYSTEM, **config: Any) -> Request:
    return Request(model="m", messages=(Message.user(text),), system=system, config=Config(**config))


def choose(text: str, *options: str, system: str | None = SYSTEM) -> Request:
    return request(
        text, system=system, extensions={"choices": list(options or ("good", "bad", "neither good nor bad"))}
    )


def together(engine: LocalEngine, requests: list[Request]) -> list[Response | Exception]:
    """Return the answers of one call of `batches`, in the order of the requests."""
    pairs = [pair for batch in engine.batches(requests) for pair in batch]
    assert sorted(index for index, _ in pairs) == list(range(len(requests)))
    return [result for _, result in sorted(pairs, key=lambda pair: pair[0])]


def batched(engine: LocalEngine, requests: list[Request]) -> list[dict[str, str]]:
    """Return the answers of each batch, by what was asked."""
    return [
        {requests[i].messages[0].text or "": text(result) for i, result in batch} for batch in engine.batches(requests)
    ]


def scored(response: Response) -> TokenLogprob:
    """Return the choice an answer made, with its log-probability."""
    assert response.logprobs is not None
    [one] = response.logprobs
    return one


def text(result: Response | Exception) -> str:
    assert isinstance(result, Response), result
    return result.message.text or ""


def test_choices_asked_together_are_answered_as_one_by_one(precise: LocalEngine, engine: LocalEngine) -> None:
    requests = [choose(review) for review in REVIEWS]
    assert len(requests) == 40
    answers = [text(result) for result in together(engine, requests)]
    alone = [text(engine.complete(one)) for one in requests]
    assert sum(one == other for one, other in zip(answers, alone, strict=True)) >= 38
    assert len(set(alone)) > 1

    exact = [text(result) for result in together(precise, requests[:3])]

    assert exact == [text(precise.complete(one)) for one in requests[:3]]


def test_the_same_requests_are_batched_and_answered_the_same_again(engine: LocalEngine) -> None:
    requests = [choose(review) for review in REVIEWS[:32]]
    first, again = (list(engine.batches(requests)) for _ in range(2))
    assert first == again
    assert len(first) > 1


def test_what_is_left_of_an_interrupted_evaluation_is_batched_as_before(engine: LocalEngine) -> None:
    requests = [choose(review) for review in REVIEWS[:32]]
    whole = batched(engine, requests)
    [first, *_] = engine.batches(requests)
    done = {index for index, _ in first}
    rest = batched(engine, [one for index, one in enumerate(requests) if index not in done])
    assert rest == whole[1:]


def test_choices_carry_their_log_probabilities_best_first(engine: LocalEngine) -> None:
    response = engine.complete(choose("The film was wonderful.", "good", "bad"))
    chosen = scored(response)
    assert (chosen.top[0].token, chosen.top[0].logprob) == (text(response), chosen.logprob)
    assert {one.token for one in chosen.top} == {"good", "bad"}
    assert 0 > chosen.top[0].logprob >= chosen.top[1].logprob
    assert (response.finish_reason, response.usage.output_tokens) == ("stop", 1)
    assert response.usage.input_tokens == engine.count_tokens(choose("The film was wonderful.", "good", "bad"))


def test_free_text_and_choices_mix_in_one_call(engine: LocalEngine) -> None:
    mixed = [
        request("What is the capital of France?", system=None, max_tokens=3),
        choose("The soup was cold.", "good", "bad"),
        request("Name a colour.", max_tokens=4),
    ]
    results = together(engine, mixed)
    assert text(results[0]) == "The capital of"
    assert text(results[1]) in {"good", "bad"}
    assert [result.finish_reason for result in results if isinstance(result, Response)] == ["length", "stop", "length"]
    assert [r.usage.output_tokens for r in results if isinstance(r, Response)] == [3, 1, 4]


@pytest.mark.parametrize("has_blocks", [True, False])
def test_texts_below_several_prefixes_are_decoded_together_as_one_by_one(
    precise: LocalEngine, monkeypatch: pytest.MonkeyPatch, has_blocks: bool
) -> None:
    if not has_blocks:
        monkeypatch.setitem(precise.__dict__, "_blocks", None)
    counts: list[int] = []
    real = decoding.decode

    def counted(model: Any, read: Any, draws: Any, **settings: Any) -> Any:
        counts.append(len(draws))
        return real(model, read, draws, **settings)

    monkeypatch.setattr(decoding, "decode", counted)
    systems = ("Answer in one word.", "Be brief. Say what is asked, and nothing that isn't.", None)
    asked = [request(f"What is {n} + {n}?", system=system, max_tokens=9) for system in systems for n in (1, 22)]
    found = [text(each) for each in together(precise, asked)]
    assert counts == [6]
    assert found == [text(precise.complete(each)) for each in asked]
    assert len(set(found)) > 3


def test_free_text_carries_log_probabilities_if_asked(engine: LocalEngine) -> None:
    asked = Request(
        model="m", messages=(Message.user("What is the capital of France?"),), config=Config(max_tokens=3, logprobs=1)
    )
    response = engine.complete(asked)
    logprobs = response.logprobs or ()
    assert "".join(one.token for one in logprobs) == text(response) == "The capital of"
    assert all(one.logprob < 0 for one in logprobs)
    assert engine.complete(request("Hello", max_tokens=1)).logprobs is None


def test_a_shared_prefix_is_computed_once(precise: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    precise._prefixes.clear()
    lengths: list[int] = []
    forward = type(precise._model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(precise._model), "forward", counted)
    for review in REVIEWS[:3]:
        precise.complete(choose(review, "good", "bad", system="A system message of its own."))

    [(prefix, cache)] = precise._prefixes.items()
    assert lengths == [len(prefix)]  # rows go through the base model; only prefixes pass here
    assert cache.get_seq_length() == len(prefix)


def test_only_the_latest_prefixes_are_kept(precise: LocalEngine) -> None:
    precise._prefixes.clear()
    for number in range(10):
        precise.complete(choose("Fine.", "good", "bad", system=f"System {number}."))
    assert len(precise._prefixes) == 8
    kept = [precise._detokenize(list(prefix)) for prefix in precise._prefixes]
    assert [f"System {number}." in prefix for number, prefix in enumerate(kept, start=2)] == [True] * 8


def test_a_copied_program_shares_the_weights(smollm: dspy.LM, engine: LocalEngine) -> None:
    program: Any = dspy.Predict("text -> label")
    program.lm = smollm
    assert copy.deepcopy(program).lm.engine is engine
    assert copy.copy(engine) is engine
    assert preceptor.LocalLM("smollm2-135m").engine is engine


def test_the_name_carries_the_fingerprint_of_the_weights(smollm: dspy.LM, engine: LocalEngine) -> None:
    assert smollm.model == engine.name == "local/smollm2-135m@b179c9523d0e"
    assert smollm.kwargs == {"temperature": 0.0, "max_tokens": 512}
    assert preceptor.LocalLM("smollm2-135m", temperature=0.7, max_tokens=9).kwargs == {
        "temperature": 0.7,
        "max_tokens": 9,
    }


def test_an_input_too_long_is_refused_with_both_lengths(engine: LocalEngine) -> None:
    with pytest.raises(
        InputTooLong,
        match=r"local/smollm2-135m@b179c9523d0e reads at most 8192 tokens, this prompt has 9\d\d\d\. "
        r"Shorten the input that begins 'word word word",
    ):
        engine.complete(request("word " * 9000))


def test_what_is_no_text_is_refused_and_not_left_out(engine: LocalEngine) -> None:
    picture = ImagePart(media_type="image/png", url="http://127.0.0.1/x.png")
    message = Message(role="user", parts=(*Message.user("What is this?").parts, picture))
    with pytest.raises(ConfigError, match="reads text only, and a message holds a part of type image"):
        engine.complete(Request(model="m", messages=(message,)))


def test_an_input_too_long_does_not_stop_the_others(engine: LocalEngine) -> None:
    long, short = together(engine, [choose("word " * 9000), choose("Fine.", "good", "bad")])
    assert isinstance(long, InputTooLong)
    assert text(short) in {"good", "bad"}


def test_an_answer_is_cut_where_the_context_ends(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request("Write one sentence about the sea.", max_tokens=50)
    monkeypatch.setattr(engine._config, "max_position_embeddings", engine.count_tokens(asked) + 5)
    response = engine.complete(asked)
    assert (response.usage.output_tokens, response.finish_reason) == (5, "length")


def test_a_sensible_continuation_scores_higher(engine: LocalEngine) -> None:
    asked = request("What is the capital of France?", system=None)
    scores = {end: engine.score(asked, f"The capital of France is {end}.") for end in ("Paris", "cheese", "Tuesday")}
    assert max(scores, key=scores.__getitem__) == "Paris"
    assert all(score < 0 for score in scores.values())
    assert asked.config.extensions is None


def test_a_score_is_the_mean_over_the_tokens(engine: LocalEngine) -> None:
    asked = choose("What is the capital of France?", "The capital is Paris.", system=None)
    response = engine.complete(asked)
    tokens = len(engine._tokens("The capital is Paris."))
    assert response.usage.output_tokens == tokens
    assert mean_log_probability(response) == scored(response).logprob / tokens
    assert engine.score(asked, "The capital is Paris.") == mean_log_probability(response)


def test_free_text_has_no_score(engine: LocalEngine) -> None:
    with pytest.raises(ModelError, match=r"This answer carries no log-probability of a choice\."):
        mean_log_probability(engine.complete(request("Hello", max_tokens=1)))


def test_a_request_without_system_message_is_rendered_by_the_template_alone(engine: LocalEngine) -> None:
    prompt = engine._prompt(request("Hello", system=None))
    assert engine._detokenize(list(prompt.prefix)) == (
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nuser\n"
    )
    assert engine._tokenizer.decode(list(prompt.suffix)) == "Hello<|im_end|>\n<|im_start|>assistant\n"


def test_the_prefix_ends_where_the_last_message_begins(engine: LocalEngine) -> None:
    messages = (Message.user("One?"), Message.assistant("Yes."), Message.user(" Two? "))
    prompt = engine._prompt(Request(model="m", messages=messages, system="Count."))
    decode = engine._tokenizer.decode
    assert decode(list(prompt.prefix)).endswith("<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n ")
    assert decode(list(prompt.suffix)) == "Two? <|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("words", ["", "assistant", "user"])
def test_an_input_that_looks_like_the_template_is_read_whole(engine: LocalEngine, words: str) -> None:
    prompt = engine._prompt(request(words, system="Count."))
    assert engine._tokenizer.decode([*prompt.prefix, *prompt.suffix]) == (
        f"<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.suffix


def test_one_choice_that_begins_another_can_win(engine: LocalEngine) -> None:
    response = engine.complete(choose("Say yes.", "yes", "yes and no", system=None))
    assert {one.token for one in scored(response).top} == {"yes", "yes and no"}
    assert text(response) == "yes"
    assert response.usage.output_tokens == 2  # the token that closes it is scored too


def test_of_several_end_tokens_the_chat_templates_closes_a_choice(engine: LocalEngine) -> None:
    several = LocalEngine(engine.load, engine._config, engine._tokenizer, "local/several")
    several._ends = frozenset({0, 2})  # <|endoftext|> and <|im_end|>
    assert branch_texts(several, ["yes", "yes and no"]) == branch_texts(engine, ["yes", "yes and no"])
    assert {choice[-1] for choice in branch_texts(several, ["yes", "yes and no"])} == {2}
    several = LocalEngine(engine.load, engine._config, engine._tokenizer, "local/several")
    several._ends = frozenset({1, 0})  # the template puts neither
    assert several.end == 0


def test_seeded_samples_differ_and_come_again(engine: LocalEngine) -> None:
    requests = [request("Name an animal.", temperature=1.0, seed=seed, max_tokens=8) for seed in (1, 2, 3)]
    first, again = ([text(result) for result in together(engine, requests)] for _ in range(2))
    assert first == again
    assert len(set(first)) == 3


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        ModelError,
        match=r"No model 'gpt-9'\. The catalogue has smollm2-135m, qwen2\.5-coder-0\.5b, qwen2\.5-coder-1\.5b, "
        r"all-minilm-l6-v2; a folder with config\.json works too\.",
    ):
        preceptor.LocalLM("gpt-9")


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"Can't load '{tmp_path}' from {tmp_path}"):
        preceptor.LocalLM(str(tmp_path))


def test_weights_are_read_when_the_model_is_first_asked_and_once(engine: LocalEngine) -> None:
    read: list[str] = []

    def load() -> Any:
        read.append("inference" if torch.is_inference_mode_enabled() else "ordinary")
        return engine.load()

    late = LocalEngine(load, engine._config, engine._tokenizer, engine.name)
    asked = choose("The film was wonderful.", "good", "bad")
    assert late.count_tokens(request("Hello")) == engine.count_tokens(request("Hello"))
    assert late.context == engine.context
    assert not read
    assert late.complete(asked).logprobs == engine.complete(asked).logprobs
    assert late.load() is engine.load()
    assert read == ["ordinary"]


def test_weights_that_are_cut_off_are_told_when_the_model_is_first_asked(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(lookup("smollm2-135m").folder / "weights", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    lm: Any = preceptor.LocalLM(str(folder))
    with pytest.raises(ModelError, match=f"Can't load '{folder}' from {folder}: "):
        lm.engine.complete(request("Hello"))


def test_a_folder_with_the_weights_is_a_model(engine: LocalEngine) -> None:
    folder = lookup("smollm2-135m").folder / "weights"
    lm: Any = preceptor.LocalLM(str(folder))
    name, _, fingerprint = lm.model.partition("@")
    assert name == f"local/{folder}"
    assert len(fingerprint) == 12
    asked = choose("The film was wonderful.", "good", "bad")
    assert lm.engine.complete(asked).logprobs == engine.complete(asked).logprobs


@pytest.mark.parametrize("text", ["m", "end", "start", "a", "assistant", "user"])
def test_a_text_that_the_templates_end_holds_too_is_found_where_it_stands(engine: LocalEngine, text: str) -> None:
    prompt = engine._prompt(Request(model=engine.name, messages=(Message.user(text),)))
    decode = engine._tokenizer.decode
    assert decode(list(prompt.prefix)).endswith("<|im_start|>user\n")
    assert decode(list(prompt.suffix)) == f"{text}<|im_end|>\n<|im_start|>assistant\n"
