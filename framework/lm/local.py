"""The in-process engine: a language model on `transformers`, fast because rows share their work.

`LocalLM("qwen2.5-coder-1.5b")` is a `dspy.LM` like any other. Its engine takes many requests at
once (`batches`), scores choices in packed forward passes, those below one prefix together
(`packing.py`), and decodes free text in batches, whatever its prompts begin with (`decoding.py`).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Final, cast

import dspy
import torch
from dspy.lm15 import Message, Request, Response, TextPart, TokenLogprob, TopLogprob, Usage

from preceptor.errors import ConfigError, InputTooLong, ModelError
from preceptor.lm import attention, decoding, graphs, packing, prefill, sampling
from preceptor.lm.fetch import Progress, quiet_transformers
from preceptor.lm.joining import Decoder, Joining, Result
from preceptor.lm.prompts import Prompt
from preceptor.lm.sampling import Tokens
from preceptor.lm.seam import InThread, mean_log_probability, only_text, text_of_parts
from preceptor.lm.soft import EmbeddingSpace, SoftTokens, soft_tokens, with_soft_tokens
from preceptor.lm.weights import locate, read

MAX_TOKENS: Final = 512
"""Tokens decoded where a request names no bound."""

_PACK: Final = {"cpu": 384, "cuda": 2048}
"""Tokens of one packed pass: beyond, attention grows faster than matrix products gain (bench engine, on processors)."""

_DECODED_TOGETHER: Final = 32
_EMBEDDED_TOGETHER: Final = 8192
_PREFIXES: Final = 8
"""Prefixes whose keys and values are kept for the next batch."""

_SHARE: Final = 4
"""What is kept for later batches is at most one part in so many of the memory of one batch."""


class LocalEngine:
    """A DSPy engine (`complete(Request) -> Response`) around one model in this process.

    Requests may carry `config.extensions["choices"]`, a list of texts: the answer is then the
    likeliest one, and `logprobs[0].top` holds log P of each. Or they may carry soft tokens (`soft.py`),
    which the model reads just before the last message's text. One call at a time runs; deep copies are
    the engine itself, so that copying a program never copies the weights.

    Args:
        load: Returns a causal language model of `transformers`; called once, when something is first asked of it.
        config: The model's settings.
        tokenizer: Its tokenizer, with a chat template.
        name: `local/<id>@<sha12>`: the fingerprint keeps answers of different weights apart.
        memory: Bound on keys and values of one batch, in bytes.
    """

    supports_choices = True
    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = frozenset({"temperature", "top_p", "top_k", "max_tokens", "stop", "seed"})

    def __init__(
        self, load: Callable[[], Any], config: Any, tokenizer: Any, name: str, *, memory: int = 2 << 30
    ) -> None:
        self.name = name
        self._load, self._config, self._tokenizer = load, config, tokenizer
        self._loaded: Any = None
        self._loading = threading.Lock()
        self._memory = memory
        self._lock = threading.Lock()
        self._prefixes: OrderedDict[Tokens, Any] = OrderedDict()

    def __copy__(self) -> LocalEngine:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalEngine:
        return self

    def load(self) -> Any:
        """Return the model, its weights read now if they weren't.

        Raises:
            ModelError: If they can't be read.
        """
        with self._loading, torch.inference_mode(mode=False):  # whoever asks first, its weights are ordinary tensors
            if self._loaded is None:
                model = self._load().eval()
                attention.use(model)
                self._loaded = model
            return self._loaded

    @property
    def _model(self) -> Any:
        return self.load()

    @cached_property
    def _blocks(self) -> prefill.Blocks | None:
        if not prefill.can_share(self._model):
            return None
        return prefill.Blocks(self._model, self._memory // _SHARE // self._bytes_per_token, _PACK["cpu"])

    @cached_property
    def _ends(self) -> frozenset[int]:
        ends = self._model.generation_config.eos_token_id
        several = cast("list[int]", ends if isinstance(ends, list) else [ends])
        return frozenset({*several, self._tokenizer.eos_token_id} - {None})

    @cached_property
    def end(self) -> int:
        """The token that ends an answer; of several, the one that the chat template puts after an assistant's."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
        rendered: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        after = self._tokens(rendered.rpartition("Yes.")[2])
        return next((token for token in after if token in self._ends), min(self._ends))

    @cached_property
    def _tail(self) -> str:
        """What the chat template puts after a user's last text."""
        turn = [{"role": "user", "content": "Yes."}]
        rendered: str = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return rendered.rpartition("Yes.")[2]

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return int(self._config.get_text_config().max_position_embeddings)

    def complete(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            InputTooLong: If prompt and answer don't fit the model's context.
        """
        [[(_, result)]] = self.batches([request])
        if isinstance(result, Exception):
            raise result
        return result

    @cached_property
    def embedding_space(self) -> EmbeddingSpace:
        """What soft tokens for this model have to look like."""
        embed = self._model.get_input_embeddings()
        with torch.inference_mode():
            ids = torch.arange(embed.weight.shape[0], device=self._model.device)
            parts = [ids[at : at + _EMBEDDED_TOGETHER] for at in range(0, len(ids), _EMBEDDED_TOGETHER)]
            norms = torch.cat([torch.linalg.vector_norm(embed(part).float(), dim=-1) for part in parts])
        return EmbeddingSpace(embed.weight.shape[1], float(norms.median()))

    def generate(self, request: Request, embeddings: SoftTokens) -> Response:
        """Answer a request with made-up token embeddings just before its last message's text.

        Raises:
            InputTooLong: If prompt and answer don't fit the model's context.
            ConfigError: If the embeddings are not as wide as the model's.
        """
        return self.complete(with_soft_tokens(request, embeddings))

    def score(self, request: Request, continuation: str) -> float:
        """Return log P(continuation | request) per token of the continuation, natural logarithm."""
        config = copy.copy(request.config)
        object.__setattr__(config, "extensions", {"choices": [continuation]})
        response = self.complete(
            Request(model=request.model, messages=request.messages, system=request.system, config=config)
        )
        return mean_log_probability(response)

    def count_tokens(self, request: Request) -> int:
        """Return the length of a request's prompt in tokens."""
        return self._prompt(request).length

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        """Answer many requests; after each executed batch, yield (index, answer or error) pairs.

        Equal lists of requests are batched equally, whoever asked when; what follows the first
        batches is batched as before if those are left out.
        """
        with self._lock, torch.inference_mode():
            refused: list[tuple[int, Result]] = []
            groups: dict[tuple[Tokens, bool, bool], list[tuple[int, Prompt]]] = defaultdict(list)
            for index, request in enumerate(requests):
                try:
                    prompt = self._prompt(request)
                    shared = prompt.prefix if prompt.choices or not attention.is_whole(self._model) else ()
                    groups[shared, bool(prompt.choices), bool(prompt.soft)].append((index, prompt))
                except (InputTooLong, ConfigError) as error:
                    refused.append((index, error))
            if refused:
                yield refused
            for (prefix, has_choices, _), members in groups.items():
                yield from self._choose(prefix, members) if has_choices else self._decode(members)

    def _choose(self, prefix: Tokens, members: list[tuple[int, Prompt]]) -> Iterator[list[tuple[int, Result]]]:
        prompts = dict(members)
        rows = [(index, packing.Row(prompt.suffix, prompt.choices)) for index, prompt in members]
        for chunk in packing.chunks(rows, _PACK[self._device]):
            own = [row for _, row in chunk]
            if attention.is_whole(self._model):
                scores = packing.log_probabilities(self._model, self._prefix(prefix), own)
            else:
                scores = packing.one_by_one(self._model, prefix, own)
            yield [(index, self._chosen(prompts[index], s)) for (index, _), s in zip(chunk, scores, strict=True)]

    def _decode(self, members: list[tuple[int, Prompt]]) -> Iterator[list[tuple[int, Result]]]:
        draws = [(index, prompt, prompt.draw(self.context, MAX_TOKENS)) for index, prompt in members]
        draws.sort(key=lambda item: (*item[1].place, item[2].seed, item[0]))
        while draws:
            fits = self._fitting(max(prompt.length + draw.max_tokens for _, prompt, draw in draws))
            fits = graphs.fitting(fits) if self._device == "cuda" else fits
            batch, draws = draws[:fits], draws[fits:]
            own = [draw for _, _, draw in batch]
            read = self._read([prompt.prefix for _, prompt, _ in batch], own)
            texts = decoding.decode(self._model, read, own, ends=self._ends, detokenize=self._detokenize)
            yield [(i, self._decoded(prompt, text)) for (i, prompt, _), text in zip(batch, texts, strict=True)]

    def _fitting(self, longest: int) -> int:
        """Return how many texts are decoded together, if the longest has so many tokens."""
        return max(1, min(_DECODED_TOGETHER, self._memory // (longest * self._bytes_per_token)))

    def joining(self) -> Joining[Any] | None:
        """Return texts that others can join while they are decoded; None on a GPU, or if attention isn't whole."""
        if self._device == "cuda" or not attention.is_whole(self._model):
            return None

        def prompted(request: Request) -> tuple[Prompt, sampling.Draw]:
            prompt = self._prompt(request)
            return prompt, prompt.draw(self.context, MAX_TOKENS)

        @contextmanager
        def turn() -> Generator[None]:
            with self._lock, torch.inference_mode():
                yield

        together = decoding.Together(self._model, ends=self._ends, detokenize=self._detokenize, is_open=True)
        return Joining(Decoder(together, prompted, self._read, self._decoded, self._fitting, turn))

    def _read(self, prefixes: Sequence[Tokens], draws: Sequence[sampling.Draw]) -> prefill.Read:
        if self._blocks is None or any(draw.soft for draw in draws):
            known = {prefix: self._prefix(prefix) for prefix in dict.fromkeys(prefixes)}
            return prefill.padded(self._model, [known[prefix] for prefix in prefixes], draws)
        return self._blocks.read([(*prefix, *draw.suffix) for prefix, draw in zip(prefixes, draws, strict=True)])

    def _prompt(self, request: Request) -> Prompt:
        """Render and tokenize a request; its prefix ends where the last message's text begins.

        Raises:
            InputTooLong: If prompt and answer don't fit; and ConfigError if a message isn't text.
        """
        messages = [{"role": message.role, "content": only_text(message)} for message in request.messages]
        if request.system:
            messages.insert(0, {"role": "system", "content": text_of_parts(request.system)})
        rendered: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        last = str(messages[-1]["content"]).strip()
        cut = max(0, rendered.removesuffix(self._tail).rfind(last)) if last else 0
        choices = branch_texts(self, cast("list[str]", (request.config.extensions or {}).get("choices", [])))
        prefix, suffix = self._tokens(rendered[:cut]), self._tokens(rendered[cut:])
        prompt = Prompt(request, prefix, suffix, choices, self._soft(request))
        answer = max(map(len, choices)) if choices else 1
        if prompt.length + answer > self.context:
            raise InputTooLong(
                f"{self.name} reads at most {self.context} tokens, this prompt has {prompt.length}. "
                f"Shorten the input that begins {last[:60]!r}."
            )
        return prompt

    def _soft(self, request: Request) -> tuple[tuple[float, ...], ...]:
        soft = soft_tokens(request)
        if not soft:
            return ()
        width = self._model.get_input_embeddings().weight.shape[1]
        if any(len(token) != width for token in soft):
            raise ConfigError(f"{self.name} takes soft tokens of {width} numbers, not of {[*map(len, soft)]}.")
        if (request.config.extensions or {}).get("choices"):
            raise ConfigError("A request has soft tokens or choices, not both: choices share what they are read after.")
        return soft

    def _tokens(self, text: str) -> Tokens:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _detokenize(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _prefix(self, prefix: Tokens) -> Any:
        """Return keys and values of a prefix, computed alone and kept for later batches."""
        from transformers import DynamicCache

        if prefix not in self._prefixes:
            cache = DynamicCache(config=self._model.config)
            if prefix:
                tokens = torch.tensor([prefix], device=self._model.device)
                self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._prefixes[prefix] = cache
            while len(self._prefixes) > 1 and self._over_memory():
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(prefix)
        return self._prefixes[prefix]

    def _over_memory(self) -> bool:
        kept = sum(map(len, self._prefixes)) * self._bytes_per_token
        return len(self._prefixes) > _PREFIXES or kept > self._memory // _SHARE

    @property
    def _device(self) -> str:
        return "cuda" if self._model.device.type == "cuda" else "cpu"

    @property
    def _bytes_per_token(self) -> int:
        config = self._model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * head * self._model.dtype.itemsize)

    def _chosen(self, prompt: Prompt, scores: list[float]) -> Response:
        texts = cast("list[str]", (prompt.request.config.extensions or {})["choices"])
        best = max(range(len(texts)), key=lambda at: (scores[at], -at))
        ranked = sorted(range(len(texts)), key=lambda at: (-scores[at], at))
        logprobs = TokenLogprob(
            texts[best], scores[best], top=tuple(TopLogprob(texts[at], scores[at]) for at in ranked)
        )
        return self._response(prompt, texts[best], "stop", len(prompt.choices[best]), (logprobs,))

    def _decoded(self, prompt: Prompt, text: decoding.Text) -> Response:
        logprobs: tuple[TokenLogprob, ...] | None = None
        if prompt.request.config.logprobs is not None:
            pairs = zip(text.tokens, text.logprobs, strict=False)
            logprobs = tuple(TokenLogprob(self._detokenize([token]), value) for token, value in pairs)
        return self._response(prompt, text.text, text.reason, len(text.tokens), logprobs)

    def _response(
        self, prompt: Prompt, text: str, reason: str, output: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> Response:
        return Response(
            id=None,
            model=self.name,
            message=Message.assistant([TextPart(text)]),
            finish_reason=cast("Any", reason),
            usage=Usage(input_tokens=prompt.length, output_tokens=output),
            logprobs=logprobs,
        )


def branch_texts(engine: LocalEngine, texts: list[str]) -> tuple[Tokens, ...]:
    """Tokenize choices so that none is the beginning of another."""
    return packing.branch([engine._tokens(text) for text in texts], engine.end) if texts else ()


_LOADED: dict[str, LocalEngine] = {}
_LOADING: Final = threading.Lock()


def LocalLM(model: str, *, progress: Progress | None = None, **settings: Any) -> dspy.LM:  # noqa: N802  reads like dspy.LM
    """Return a `dspy.LM` on a model in this process; equal models share their weights, read when first asked.

    Args:
        model: A name of the catalogue, a Hugging Face id, or a folder with `config.json`.
        progress: Told of bytes done and in all while the model is fetched.
        settings: Defaults for calls, as `dspy.LM` takes them (`temperature`, `max_tokens`, ...).

    Raises:
        ModelError: If the model can't be found or fetched, or its settings or tokenizer can't be read.
    """
    with _LOADING:
        if model not in _LOADED:
            _LOADED[model] = _engine(model, progress)
    engine = _LOADED[model]
    defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "cache": False, **settings}
    return dspy.LM(engine.name, engine=engine, async_engine=InThread(engine), num_retries=0, **defaults)


def _engine(model: str, progress: Progress | None) -> LocalEngine:
    """Return an engine whose settings and tokenizer are read, and whose weights are there but not read yet."""
    from transformers import AutoConfig, AutoTokenizer

    source, sha = locate(model, progress)
    try:
        with quiet_transformers():
            config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"Can't load {model!r} from {source}: {str(error).splitlines()[0]}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{model!r} has no chat template; use an instruction-tuned model.")
    if attention.keeps_states(config):
        raise ModelError(
            f"{model!r} has layers that keep a state, such as convolutions: texts can't be decoded together. "
            "Serve it (vLLM, Ollama) and pass --api-base."
        )
    return LocalEngine(partial(read, model, source), config, tokenizer, f"local/{model.rstrip('/')}@{sha[:12]}")
