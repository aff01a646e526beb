"""Continue texts with a trained model: one text step by step, several by the engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ritornello.config import ExitRule, Recipe, require
from ritornello.device import pick_device
from ritornello.engine.constraints import Constraint, Grammars
from ritornello.engine.engine import Engine, is_compiled
from ritornello.engine.pages import Layout
from ritornello.engine.quantize import Weights, quantize
from ritornello.engine.request import Draft, Request, check_request
from ritornello.engine.sampling import NO_TOKEN, Sampling, sample
from ritornello.engine.text import Generation, Text
from ritornello.limits import check
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, tensors
from ritornello.train.tokenizer import Tokenizer, from_json

ROOM = 4  # texts of max_seq_len that the engine has memory for, if so many tokens are asked for
ENGINE_ONLY = "penalties, biases, constraints, loop_budget and draft"
UNFOLLOWED = "no token may follow: the constraint has become too complex, or logits are not numbers"
OVERFLOWED = "logits that are not numbers: the state has overflowed; lower n_loops"


@dataclass(frozen=True)
class Loaded:
    """A trained model with all that its text needs; the run or checkpoint it was read from, and what that one says of
    its weights, where they are exact."""

    model: RecurrentDepthTransformer
    tokenizer: Tokenizer
    recipe: Recipe
    path: Path | None = None
    manifest: checkpoint.Manifest | None = None


def load(path: str | Path, *, device: str = "auto", weights: Weights | None = None) -> Loaded:
    """The model of a run's newest valid checkpoint, or of one checkpoint directory, ready to generate.

    weights: `bf16` or `int8` rounds its matrices (see `quantize`), which pays once the model is compiled.

    Raises:
        ValueError: nothing valid there; the file is named.
    """
    target, found = pick_device(device), checkpoint.load(path)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(found.recipe.model)
    tensors.check(found.model_state, model.state_dict(), found.model.source)
    model.load_state_dict(found.model_state, assign=True)
    tokenizer, room = from_json(found.tokenizer_json), model.config.vocab_size
    name, n_ids = f"{found.directory / checkpoint.TOKENIZER} vocab_size", tokenizer.vocab_size
    require(n_ids <= room, name, n_ids, f"at most the model's {room}")
    model.eval().to(target)
    if weights is not None:
        quantize(model, weights)
    return Loaded(model, tokenizer, found.recipe, Path(path), found.manifest if weights is None else None)


def decode(
    model: RecurrentDepthTransformer,
    prompts: Sequence[Sequence[int]],
    *,
    n_new: int,
    vocab_size: int | None = None,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    sampling: Sampling | None = None,
    use_cache: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next token (B,) of each prompt and the loops (B,) it took, `n_new` times or until max_seq_len.

    Shorter prompts are padded on the left and move on together. Ids from `vocab_size` on, which a padded embedding has
    beyond the tokenizer's, are never chosen. Without a cache everything is computed anew each time.

    Raises:
        ValueError: no prompt, an empty one, or one longer than max_seq_len; before anything is computed.
    """
    config, device, lengths = model.config, model.norm.weight.device, [len(prompt) for prompt in prompts]
    require(min(lengths, default=0) > 0, "prompts", lengths, "at least one, of at least one token each")
    longest, limit = max(lengths), config.max_seq_len
    require(longest <= limit, "prompt", f"{longest} tokens", f"at most max_seq_len = {limit}")
    end = min(longest + n_new, limit)
    how = sampling or Sampling()

    @torch.inference_mode()
    def steps() -> Iterator[tuple[Tensor, Tensor]]:
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        padding = [[-1] * (longest - n) + [0] * n for n in lengths]
        documents = torch.tensor(padding, device=device) if min(lengths) < longest else None
        cache = None
        if use_cache:
            depth, dtype = n_loops or config.n_loops, model.head_weight.dtype
            cache = Cache(config, batch_size=len(prompts), max_len=end, n_loops=depth, dtype=dtype, device=device)
        for index in range(end - longest):
            out = model(tokens, n_loops=n_loops, exit=exit, documents=documents, cache=cache, return_logits=False)
            chosen = sample(model.logits(out.hidden[:, -1])[:, :vocab_size], how, index=index)
            yield chosen, out.loops_used[:, -1]
            if index + 1 == end - longest:
                return
            if cache is not None:
                tokens, documents = chosen[:, None], None
            else:
                tokens = torch.cat((tokens, chosen[:, None]), 1)
                documents = None if documents is None else torch.cat((documents, torch.zeros_like(tokens[:, :1])), 1)

    return steps()


class Wishes(TypedDict, total=False):
    """What may be asked for a text, whoever writes it."""

    max_tokens: int  # 256
    n_loops: int | None  # depth of each token, with `exit` the most it may reach; None: the model's own
    exit: ExitRule | None  # lets each token stop early; None: never
    loop_budget: float | None  # loops of a token in the mean; None: no limit but n_loops
    draft: Draft | None  # few loops guess, full depth agrees or not: the same text, faster where they are mostly right
    constraint: Constraint | None  # what each text is; None: anything
    stop: str | Sequence[str]  # the text ends before the first of these
    temperature: float  # these and those after them: see Sampling
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]


class Options(Wishes, total=False):
    """What `generate` and `stream` take by keyword."""

    use_cache: bool  # True; False computes everything anew for each token, to compare with


def stream(
    loaded: Loaded, prompt: str, *, observer: Callable[[Generation], object] | None = None, **options: Unpack[Options]
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; joined, the text that `generate` returns, of which `observer`
    is told at the end.

    Raises:
        ValueError: an argument out of range, before anything is computed.
    """
    (text,), steps = _start(loaded, [prompt], **options)

    def pieces() -> Iterator[str]:
        yield from (piece for pieces in steps for piece in pieces if piece)
        if observer is not None:
            observer(text.generation)

    return pieces()


@overload
def generate(loaded: Loaded, prompts: str, **options: Unpack[Options]) -> Generation: ...
@overload
def generate(loaded: Loaded, prompts: Sequence[str], **options: Unpack[Options]) -> list[Generation]: ...
def generate(loaded: Loaded, prompts: str | Sequence[str], **options: Unpack[Options]) -> Generation | list[Generation]:
    """Continue one text, or several at once: row i samples with seed + i, and is what it would be alone.

    Raises:
        ValueError: an argument out of range, before anything is computed.
    """
    texts, steps = _start(loaded, [prompts] if isinstance(prompts, str) else prompts, **options)
    for _ in steps:
        pass
    results = [text.generation for text in texts]
    return results[0] if isinstance(prompts, str) else results


def requests(
    loaded: Loaded, prompts: Sequence[str], *, stop: str | Sequence[str] = (), **wishes: Any
) -> tuple[list[Request], list[str]]:
    """What is asked for these texts, row i with seed + i, and the strings that end them: everything is checked."""
    require(isinstance(loaded, Loaded), "loaded", type(loaded).__name__, "what load(...) returns")
    tokenizer, stops = loaded.tokenizer, stop_texts(stop)
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    require(len(ids) > 0, "prompts", prompts, "at least one text")
    return requests_of(loaded, ids, **wishes), stops


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """One or several, as they were given."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    require(all(stops), "stop", stop, "texts, none empty")
    return stops


def requests_of(
    loaded: Loaded,
    ids: Sequence[list[int]],
    *,
    max_tokens: int = 256,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    loop_budget: float | None = None,
    draft: Draft | None = None,
    constraint: Constraint | None = None,
    n_logprobs: int | None = None,
    scores_prompt: bool = False,
    **sampling: Any,
) -> list[Request]:
    """The same of prompts that are ids already."""
    if n_loops is not None:
        check("loops", n_loops, "n_loops")
    model, tokenizer, checked = loaded.model, loaded.tokenizer, Sampling(**sampling)
    longest, limit = max(map(len, ids)), model.config.max_seq_len
    require(longest <= limit, "prompt", f"{longest} tokens", f"at most max_seq_len = {limit}")
    how: Any = {"max_tokens": max_tokens, "n_loops": n_loops, "exit": exit}
    how |= {"n_logprobs": n_logprobs, "scores_prompt": scores_prompt}
    how |= {"stop": tokenizer.stop_ids, "loop_budget": loop_budget, "draft": draft, "constraint": constraint}
    seeds = [replace(checked, seed=(checked.seed + i) % 2**63) for i in range(len(ids))]
    asked = [Request(prompt=row, sampling=seed, **how) for row, seed in zip(ids, seeds, strict=True)]
    check_request(model.config, asked[0], n_loops=n_loops or model.config.n_loops, vocab_size=tokenizer.vocab_size)
    return asked


def engine_for(loaded: Loaded, *, n_loops: int, n_tokens: int, constrained: bool) -> Engine:
    """With memory for texts of so many tokens in all, or for ROOM texts of max_seq_len where that is less."""
    config = loaded.model.config
    most = max(1, min(n_tokens, ROOM * config.max_seq_len))
    n_rows = Layout(config, n_loops=n_loops).most_rows(most)
    grammars = Grammars(loaded.tokenizer) if constrained else None
    vocab_size = loaded.tokenizer.vocab_size
    return Engine(loaded.model, n_rows=n_rows, n_loops=n_loops, vocab_size=vocab_size, grammars=grammars)


def _start(
    loaded: Loaded, prompts: Sequence[str], *, use_cache: bool = True, **options: Any
) -> tuple[list[Text], Iterator[list[str]]]:
    """Check everything now; the iterator then yields, step by step, what each text gained."""
    asked, stops = requests(loaded, prompts, **options)
    texts = [Text(loaded.tokenizer, stops) for _ in asked]
    alone = len(asked) == 1 and not asked[0].needs_engine  # nothing to share a pass with: shorter is faster
    if not use_cache or is_compiled(loaded.model) or alone:
        return texts, _in_lockstep(loaded, texts, asked, use_cache)
    return texts, _served(loaded, texts, asked)


def _served(loaded: Loaded, texts: Sequence[Text], asked: Sequence[Request]) -> Iterator[list[str]]:
    """By the engine: each token as deep as it must."""
    config, places = loaded.model.config, {}
    n_tokens = sum(request.room(config.max_seq_len) for request in asked)
    constrained, n_loops = asked[0].constraint is not None, asked[0].n_loops or config.n_loops
    engine = engine_for(loaded, n_loops=n_loops, n_tokens=n_tokens, constrained=constrained)
    for i, request in enumerate(asked):
        if len(request.prompt) < config.max_seq_len:
            places[engine.submit(request)] = i

    def pieces() -> Iterator[list[str]]:
        while engine.busy:
            new = [""] * len(texts)
            for event in engine.step():
                i = places[event.number]
                if texts[i].reason:  # a stop string, in the middle of a draft
                    continue
                if event.reason == "failed":
                    raise ArithmeticError(UNFOLLOWED if constrained else OVERFLOWED)
                new[i] += texts[i].take(event)
                if texts[i].reason:
                    engine.cancel(event.number)
            yield new
        yield ["" if text.reason else text.finish("length") for text in texts]

    return pieces()


def _in_lockstep(
    loaded: Loaded, texts: Sequence[Text], asked: Sequence[Request], use_cache: bool
) -> Iterator[list[str]]:
    """All texts take each step together: what a compiled model does best, and the shorter way for one text."""
    lengths, how, runs = [len(request.prompt) for request in asked], asked[0], []
    plain = not how.needs_engine
    require(plain, "model", "compiled or used without a cache", f"as load gives it, for {ENGINE_ONLY}")
    cramped = min(lengths) < max(lengths) and max(lengths) + how.max_tokens > loaded.model.config.max_seq_len
    size = 1 if cramped else len(asked)  # together, padding would take a shorter text's room
    for first in range(0, len(asked), size):
        some = asked[first : first + size]
        run = decode(
            loaded.model,
            [request.prompt for request in some],
            n_new=how.max_tokens,
            vocab_size=loaded.tokenizer.vocab_size,
            n_loops=how.n_loops,
            exit=how.exit,
            sampling=some[0].sampling,
            use_cache=use_cache,
        )
        runs.append(_write(texts[first : first + size], run))
    return chain.from_iterable(runs)


def _write(texts: Sequence[Text], run: Iterator[tuple[Tensor, Tensor]]) -> Iterator[list[str]]:
    """Hand each text its tokens until it ends."""
    for chosen, loops in run:
        rows = list(zip(texts, chosen.tolist(), loops.tolist(), strict=True))
        if any(token == NO_TOKEN and not text.reason for text, token, _ in rows):
            raise ArithmeticError(OVERFLOWED)
        yield ["" if text.reason else text.push(token, used) for text, token, used in rows]
        if all(text.reason for text in texts):
            return
    yield ["" if text.reason else text.finish("length") for text in texts]
