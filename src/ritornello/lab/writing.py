"""Chains asked one question at a time, answered in silence or hop by hop in writing, and what either takes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ritornello.accounting import flops_per_token
from ritornello.config import ModelConfig
from ritornello.lab.measure import problems
from ritornello.lab.tasks.chains import Chains
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.data import NO_LABEL


@dataclass(frozen=True)
class Asked:
    """prompts (n, N + 1, 2): the edges of a graph, then one question; answers (n,): the ends of the chains."""

    prompts: Tensor
    answers: Tensor

    @staticmethod
    def of(task: Chains, hops: int, n: int) -> "Asked":
        """The test questions that depth extrapolation asks, each alone."""
        batch = problems(task, hops, told=False, n=n)
        rows, places = np.nonzero(batch.labels != NO_LABEL)
        edges, questions = batch.tokens[rows, : task.n_nodes], batch.tokens[rows, places]
        prompts = np.concatenate([edges, questions[:, None]], axis=1)
        return Asked(torch.from_numpy(prompts), torch.from_numpy(batch.labels[rows, places]))


@torch.no_grad()
def write(model: RecurrentDepthTransformer, prompts: Tensor, n_tokens: int) -> Tensor:
    """(n, n_tokens): nodes, each the likeliest after those before it, with a cache. What `generate` does, for tokens of
    two ids, which it doesn't take."""
    n, length, n_nodes = prompts.shape[0], prompts.shape[1], prompts.shape[1] - 1
    cache = Cache(model.config, batch_size=n, max_len=length + n_tokens, n_loops=1, dtype=torch.float32)
    tokens, written = prompts, []
    for _ in range(n_tokens):
        hidden = model(tokens, cache=cache, return_logits=False).hidden[:, -1]
        written.append(model.logits(hidden)[:, :n_nodes].argmax(-1))
        tokens = as_question(written[-1], n_nodes)
    return torch.stack(written, dim=1)


def as_question(nodes: Tensor, n_nodes: int) -> Tensor:
    """(n,) -> (n, 1, 2): the token that asks for what follows each node."""
    return torch.stack([n_nodes + nodes, torch.full_like(nodes, n_nodes)], dim=-1)[:, None]


def n_written(prompts: Tensor, written: Tensor) -> Tensor:
    """(n,): tokens until a node is written twice in a row, the end of its chain; all of them if none is."""
    n_nodes = prompts.shape[1] - 1
    before = torch.cat([prompts[:, -1:, 0] - n_nodes, written[:, :-1]], dim=1)
    again = written == before
    again[:, -1] = True
    return 1 + again.int().argmax(dim=1)


def head_flops(config: ModelConfig) -> int:
    return 2 * config.dim * config.vocab_size


def writing_flops(config: ModelConfig, prompt: int, n_tokens: float) -> float:
    """Of an answer of `n_tokens` by a plain model: the prompt at once, of which the last token alone is read, then all
    but the last token by the cache."""
    first = prompt * flops_per_token(config, seq_len=prompt, n_loops=1, training=False, convention="causal")
    return first - (prompt - 1) * head_flops(config) + (n_tokens - 1) * token_flops(config, prompt + n_tokens / 2)


def token_flops(config: ModelConfig, seen: float) -> float:
    """Of one token written after `seen`."""
    return flops_per_token(config, seq_len=round(seen), n_loops=1, training=False, convention="decode")


def silent_flops(config: ModelConfig, prompt: int, token_loops: float) -> float:
    """Of an answer by a looped model whose tokens loop `token_loops` times in all, the last token alone being read."""
    once = 2 * _looped_flops(config, prompt, 1) - _looped_flops(config, prompt, 2)
    return prompt * once - (prompt - 1) * head_flops(config) + token_loops * loop_flops(config, prompt)


def loop_flops(config: ModelConfig, prompt: int) -> float:
    """Of one loop of one token, with the probe and the gate that are read after it."""
    gate = 2 * config.dim * config.dim + head_flops(config) if config.needs_probe else 0
    return _looped_flops(config, prompt, 2) - _looped_flops(config, prompt, 1) + gate


def _looped_flops(config: ModelConfig, prompt: int, n_loops: int) -> int:
    return flops_per_token(config, seq_len=prompt, n_loops=n_loops, training=False, convention="causal")


def by_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median milliseconds of each, one after the other `repeats` times, so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first one warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}
