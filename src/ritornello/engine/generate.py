"""Continue texts with a trained model: a thin function over prefill and decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ritornello.config import MAX_LOOPS, ExitRule, Recipe, require, require_int
from ritornello.device import pick_device
from ritornello.engine.sampling import Sampling, sample
from ritornello.model.cache import Cache
from ritornello.model.halting import check_exit
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
    vocab_size: int | None = None,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    sampling: Sampling | None = None,
    use_cache: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next token (B,) of each prompt and the loops (B,) it took, `n_new` times or until max_seq_len.

    Shorter prompts are padded on the left and move on together. Ids from `vocab_size` on, which a padded embedding has
    beyond the tokenizer's, are never chosen. Without a cache everything is computed anew each time.
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
        chosen = sample(model.logits(out.hidden[:, -1])[:, :vocab_size], sampling, index=index)
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


class Options(TypedDict, total=False):
    """What `generate` and `stream` take by keyword."""

    max_tokens: int  # 256
    n_loops: int | None  # depth of each token, with `exit` the most it may reach; None: the model's own
    exit: ExitRule | None  # lets each token stop early; None: never
    stop: Sequence[str]  # the text ends before the first of these
    use_cache: bool  # True
    temperature: float  # these five: see Sampling
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int


def stream(loaded: Loaded, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; joined, the text that `generate` returns.

    Raises:
        ValueError: an argument out of range, before anything is computed.
    """
    _, steps = _start(loaded, [prompt], **options)
    return (piece for pieces in steps for piece in pieces if piece)


@overload
def generate(loaded: Loaded, prompts: str, **options: Unpack[Options]) -> Generation: ...
@overload
def generate(loaded: Loaded, prompts: Sequence[str], **options: Unpack[Options]) -> list[Generation]: ...
def generate(loaded: Loaded, prompts: str | Sequence[str], **options: Unpack[Options]) -> Generation | list[Generation]:
    """Continue one text, or several at once: row i samples with seed + i.

    Raises:
        ValueError: an argument out of range.
    """
    texts, steps = _start(loaded, [prompts] if isinstance(prompts, str) else prompts, **options)
    for _ in steps:
        pass
    results = [Generation(text.text, text.tokens, text.loops, text.reason) for text in texts]
    return results[0] if isinstance(prompts, str) else results


def _start(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    n_loops: int | None = None,
    exit: ExitRule | None = None,
    stop: Sequence[str] = (),
    use_cache: bool = True,
    **sampling: Any,
) -> tuple[list[_Text], Iterator[list[str]]]:
    """Check everything now; the iterator then yields, step by step, what each text gained."""
    require_int("max_tokens", max_tokens, 1)
    if n_loops is not None:
        require_int("n_loops", n_loops, 1, MAX_LOOPS)
    check_exit(loaded.model.config, exit)
    tokenizer, checked = loaded.tokenizer, Sampling(**sampling)
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    texts = [_Text(tokenizer, stop) for _ in prompts]

    def steps() -> Iterator[list[str]]:
        how = {"n_loops": n_loops, "exit": exit, "sampling": checked, "use_cache": use_cache}
        for chosen, loops in decode(loaded.model, ids, n_new=max_tokens, vocab_size=tokenizer.vocab_size, **how):
            rows = zip(texts, chosen.tolist(), loops.tolist(), strict=True)
            yield ["" if text.reason else text.push(token, used) for text, token, used in rows]
            if all(text.reason for text in texts):
                return
        yield ["" if text.reason else text.finish("length") for text in texts]

    return texts, steps()
