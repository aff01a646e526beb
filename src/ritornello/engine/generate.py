"""Continue texts with a trained model: a thin function over prefill and decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from ritornello.config import ExitRule, Recipe, require, require_int
from ritornello.device import pick_device
from ritornello.engine.sampling import Sampling, sample
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint
from ritornello.train.tokenizer import StreamDecoder, Tokenizer, from_json


@dataclass(frozen=True)
class Loaded:
    """A trained model with all that its text needs."""

    model: RecurrentDepthTransformer
    tokenizer: Tokenizer
    recipe: Recipe


@dataclass(frozen=True)
class Generation:
    """The continuation; its tokens; the loops each took; why it ended: `stop`, `end` (of the document) or `length`."""

    text: str
    tokens: list[int]
    loops: list[int]
    reason: str


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """The model of a run's newest valid checkpoint, or of one checkpoint directory, ready to generate.

    Raises:
        ValueError: nothing valid there; the file is named.
    """
    found = checkpoint.load(path)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(found.recipe.model)
    model.load_state_dict(found.model_state, assign=True)
    return Loaded(model.eval().to(pick_device(device)), from_json(found.tokenizer_json), found.recipe)


@torch.inference_mode()
def decode(
    model: RecurrentDepthTransformer,
    prompts: Sequence[Sequence[int]],
    *,
    n_new: int,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    sampling: Sampling | None = None,
    use_cache: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next token (B,) of each prompt and the loops (B,) it took, `n_new` times or until max_seq_len.

    Shorter prompts are padded on the left and move on together. Without a cache everything is computed anew each time.
    """
    config, device = model.config, model.norm.weight.device
    sampling = sampling or Sampling()
    require(len(prompts) > 0 and all(prompts), "prompts", [len(p) for p in prompts], "at least one token each")
    longest = max(map(len, prompts))
    require(longest <= config.max_seq_len, "prompt", f"{longest} tokens", f"at most max_seq_len = {config.max_seq_len}")
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    padding = [[-1] * (longest - len(p)) + [0] * len(p) for p in prompts]
    documents = torch.tensor(padding, device=device) if any(len(p) < longest for p in prompts) else None
    end = min(longest + n_new, config.max_seq_len)
    cache = None
    if use_cache:
        depth = n_loops or config.n_loops
        dtype = model.head_weight.dtype
        cache = Cache(config, batch_size=len(prompts), max_len=end, n_loops=depth, dtype=dtype, device=device)
    for index in range(end - longest):
        out = model(tokens, n_loops=n_loops, exit=exit, documents=documents, cache=cache, return_logits=False)
        chosen = sample(model.logits(out.hidden[:, -1]), sampling, index=index)
        yield chosen, out.loops_used[:, -1]
        if cache is not None:
            tokens, documents = chosen[:, None], None
        else:
            tokens = torch.cat((tokens, chosen[:, None]), 1)
            documents = None if documents is None else torch.cat((documents, torch.zeros_like(tokens[:, :1])), 1)


class _Text:
    """One growing continuation: decodes, watches for stop strings, holds back what may become one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.decoder = StreamDecoder(tokenizer)
        self.tokens: list[int] = []
        self.loops: list[int] = []
        self.text = self.held = ""
        self.reason = ""

    def push(self, token: int, loops: int) -> str:
        """Take a token; return the text that is now certain."""
        if token == self.tokenizer.eos_id:
            return self.finish("end")
        if token >= self.tokenizer.vocab_size:  # a model's vocabulary may be padded beyond the tokenizer's
            return ""
        self.tokens.append(token)
        self.loops.append(loops)
        self.held += self.decoder.push([token])
        found = [at for at in (self.held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.held = self.held[: min(found)]
            return self._release(len(self.held), "stop")
        return self._release(len(self.held) - self._unsure(), "")

    def finish(self, reason: str) -> str:
        self.held += self.decoder.finish()
        return self._release(len(self.held), reason)

    def _unsure(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        lengths = range(max(map(len, self.stop), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(s.startswith(self.held[-n:]) for s in self.stop if len(s) > n)), 0)

    def _release(self, n: int, reason: str) -> str:
        piece, self.held, self.reason = self.held[:n], self.held[n:], reason
        self.text += piece
        return piece


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """An empty prompt starts after the end of a document."""
    return tokenizer.encode(prompt) or [tokenizer.eos_id]


def stream(
    model: RecurrentDepthTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    use_cache: bool = True,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; joined, the text that `generate` returns.

    Args:
        n_loops: depth of each token, with `exit` the most it may reach; default the model's own.
        exit: lets each token stop early.
        temperature, top_k, top_p, min_p, seed: see Sampling.
        stop: the text ends before the first of these strings.
    Raises:
        ValueError: an argument out of range, before anything is computed.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    require_int("max_tokens", max_tokens, 1)
    prompts = [_ids(tokenizer, prompt)]
    text = _Text(tokenizer, stop)

    def pieces() -> Iterator[str]:
        for ids, loops in decode(
            model, prompts, n_new=max_tokens, n_loops=n_loops, exit=exit, sampling=sampling, use_cache=use_cache
        ):
            yield text.push(int(ids[0]), int(loops[0]))
            if text.reason:
                return
        yield text.finish("length")

    return (piece for piece in pieces() if piece)


@overload
def generate(loaded: Loaded, prompts: str, **options: object) -> Generation: ...
@overload
def generate(loaded: Loaded, prompts: Sequence[str], **options: object) -> list[Generation]: ...
def generate(loaded, prompts, *, max_tokens=256, n_loops=None, exit=None, stop=(), use_cache=True, **sampling):  # noqa: ANN
    """Continue one text, or several at once (row i samples with seed + i). Options as in `stream`."""
    require_int("max_tokens", max_tokens, 1)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    model, tokenizer = loaded.model, loaded.tokenizer
    done = [_Text(tokenizer, stop) for _ in texts]
    options = {"n_new": max_tokens, "n_loops": n_loops, "exit": exit, "use_cache": use_cache}
    steps = decode(model, [_ids(tokenizer, text) for text in texts], sampling=Sampling(**sampling), **options)
    for ids, loops in steps:
        for text, token, used in zip(done, ids.tolist(), loops.tolist(), strict=True):
            if not text.reason:
                text.push(token, used)
        if all(text.reason for text in done):
            break
    for text in done:
        if not text.reason:
            text.finish("length")
    results = [Generation(text.text, text.tokens, text.loops, text.reason) for text in done]
    return results[0] if isinstance(prompts, str) else results
