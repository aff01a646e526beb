"""Starting a run from another run's weights, at other depths if need be."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ritornello.config import ModelConfig, require
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import checkpoint, tensors
from ritornello.train.tokenizer import extends

NEW_PARTS = ("halting.", "probe.")  # may be absent in the other run: they start as initialised
LOOP_TABLES = (".loop_A", ".loop_B", "loop_embedding.weight")
VOCABULARY_TABLES = ("embed_tokens.0.weight", "head.weight")


def warm_start(model: RecurrentDepthTransformer, source: str, *, tokenizer_json: str) -> None:
    """Copy the weights of `source`, a run or a checkpoint, into `model`, in place.

    A halting head or probe that one of the two lacks is left out. Tables by loop index are extended by their last row,
    which deeper loops read anyway, so that nothing changes at any depth; or cut, which changes the loops beyond. A
    larger vocabulary's new rows stay as initialised: a run of conversations may start from one of text with the same
    tokenizer, whose chat form has more ids.

    Raises:
        ValueError: a tokenizer that gives an id another meaning, or a model of another shape.
    """
    other = checkpoint.load(source)
    same = extends(tokenizer_json, other.tokenizer_json)
    require(same, "train.warm_start", source, "a run with the same tokenizer", "its token ids mean other text")
    expected = model.state_dict()
    state = {name: t for name, t in other.model_state.items() if name in expected or not name.startswith(NEW_PARTS)}
    state |= {name: t for name, t in expected.items() if name not in state and name.startswith(NEW_PARTS)}
    state = resized(state, model.config)
    state |= {
        name: _grown(state[name], expected[name]) for name in VOCABULARY_TABLES if name in state and name in expected
    }
    tensors.check(state, expected, other.model.source)
    model.load_state_dict(state)


def resized(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`state` with every table by loop index cut or extended to `config.n_loops` rows."""
    names = [*LOOP_TABLES, *([".e_score_correction_bias"] if config.router_bias_per_loop else [])]
    return {name: _rows(t, config.n_loops) if name.endswith(tuple(names)) else t for name, t in state.items()}


def _grown(table: Tensor, initial: Tensor) -> Tensor:
    """`table` with the rows of `initial` that it lacks."""
    fits = table.dim() == initial.dim() == 2 and table.shape[1] == initial.shape[1]
    return torch.cat((table, initial[len(table) :].to(table))) if fits and len(table) < len(initial) else table


def _rows(table: Tensor, n: int) -> Tensor:
    return table[torch.arange(n).clamp(max=len(table) - 1)]
