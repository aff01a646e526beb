"""A recurrent-depth transformer from a plain pretrained one: layers that follow each other become loops.

With P layers before, K in a loop of L loops and C after, P + K·L + C = N, layer P + i·K + j becomes loop i of recurrent
layer j. One matrix stands for the L tied ones, and what each had of its own is a low-rank delta of that loop, the
truncated SVD of the difference (Relaxed Recursive Transformers 2410.20672, §2.3). Norms that are read by matrices alone
move into them. At full rank nothing is lost: the model says what the plain one said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ritornello.config import ModelConfig, pick, require, require_int
from ritornello.hub.moments import READ_BY, Moments, fit, roots
from ritornello.model.injection import INJECTIONS
from ritornello.model.lora import Linear
from ritornello.model.rdt import RecurrentDepthTransformer

Init = Literal["mean", "first", "last"]
Comeback = Literal["none", "lti"]
INITS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {  # of tied matrices (L, out, in), and what they read
    "mean": lambda tied, seen: tied.mean(0) if seen is None else fit(tied, seen),
    "first": lambda tied, seen: tied[0],
    "last": lambda tied, seen: tied[-1],
}
MATRICES = (*READ_BY["input_layernorm"], "self_attn.o_proj", *READ_BY["post_attention_layernorm"], "mlp.down_proj")
COMEBACKS: dict[str, dict[str, Any]] = {
    "none": {"injection": "none"},
    "lti": {"injection": "lti", "rho_max": 1.0, "decay_init": 1 - 2**-13, "input_init": 0.0},
}
Layers = list[dict[str, Tensor]]  # by part, of each layer


@torch.no_grad()
def upcycle(
    model: RecurrentDepthTransformer,
    *,
    n_prelude: int,
    n_recurrent: int,
    n_loops: int,
    rank: int,
    init: Init = "mean",
    injection: Comeback = "none",
    moments: Sequence[Moments] | None = None,
) -> RecurrentDepthTransformer:
    """The looped model of a plain one, in its dtype; they share no memory.

    Args:
        rank: of each loop's deltas on q, k, v, o and the feed-forward network; 0: none. The largest that there can be,
            dim or what is narrower, loses nothing.
        init: the matrix that stands for the tied ones; see `INITS`.
        injection: "none": h goes on as it is, as between layers. "lti": u = A·h + B·e with B = 0 and A = 1 − 2⁻¹³, so
            that training may bring the input back; that much off the plain model.
        moments: of `second_moments`: what is lost is then least in what matrices say on that text.

    Raises:
        ValueError: no plain model of `pre` norms and GQA without biases, or its layers do not come out even.
    """
    config, layers = model.config, [*model.prelude_layers, *model.coda_layers]
    shape = looped_shape(config, n_prelude=n_prelude, n_recurrent=n_recurrent, n_loops=n_loops, rank=rank)
    shape = replace(shape, **pick(COMEBACKS, injection, "injection"))
    shared = pick(INITS, init, "init")
    with torch.device("meta"):
        made = RecurrentDepthTransformer(shape)
    state = {name: x for name, x in model.state_dict().items() if "_layers." not in name}
    parts = [dict(layer.state_dict()) for layer in layers]
    end = n_prelude + n_recurrent * n_loops
    for stack, some in (("prelude_layers", parts[:n_prelude]), ("coda_layers", parts[end:])):
        state |= {f"{stack}.{i}.{name}": x for i, part in enumerate(some) for name, x in part.items()}
    for j in range(n_recurrent):
        some = slice(n_prelude + j, end, n_recurrent)
        tied = _tied(parts[some], shared, rank, None if moments is None else moments[some])
        state |= {f"recurrent.{j}.{name}": x for name, x in tied.items()}
    state = {name: x.clone() for name, x in state.items()} | _injection(shape, model.norm.weight)
    made.load_state_dict(state, assign=True)
    return made.train(model.training)


def looped_shape(c: ModelConfig, *, n_prelude: int, n_recurrent: int, n_loops: int, rank: int) -> ModelConfig:
    """Of the model that `upcycle` makes of one of shape `c`, with injection `none`."""
    known = c.is_plain and c.norm == "pre" and c.attention == "gqa" and not c.qk_bias
    require(known, "model", f"{c.attention}, norm {c.norm!r}", "plain, of 'pre' norms, with GQA without biases")
    require(c.activation == "swiglu", "activation", c.activation, "'swiglu'")
    require(not c.value_embeddings, "value_embeddings", c.value_embeddings, "(): they are of single layers")
    require_int("n_prelude", n_prelude, 0)
    require_int("n_recurrent", n_recurrent, 1)
    require_int("n_loops", n_loops, 1)
    require_int("rank", rank, 0, min(c.dim, max(c.ffn_dim, c.n_heads * c.head_dim)))
    n_coda = c.n_layers - n_prelude - n_recurrent * n_loops
    layers = f"{n_prelude} + {n_recurrent} x {n_loops}"
    require(n_coda >= 0, "n_prelude + n_recurrent x n_loops", layers, f"at most the {c.n_layers} layers that there are")
    return replace(
        c,
        n_prelude_layers=n_prelude,
        n_recurrent_layers=n_recurrent,
        n_coda_layers=n_coda,
        n_loops=n_loops,
        ffn="dense",
        lora_rank=rank,
        lora_targets=("q", "k", "v", "o", "ffn") if rank else (),
        loop_embedding=False,
        normalize_input=False,
        injection="none",
        initial_state="e",
    )


def split(n_layers: int, n_loops: int, *, n_prelude: int | None = None, n_coda: int | None = None) -> tuple[int, int]:
    """n_prelude and n_recurrent for a model of `n_layers`. What is not said: an eighth before, and as many layers or a
    few more after, so that what is left is a multiple of `n_loops`."""
    require_int("n_loops", n_loops, 1)
    before = round(n_layers / 8) if n_prelude is None else n_prelude
    least = round(n_layers / 8) if n_coda is None else n_coda
    after = least if n_coda is not None else least + (n_layers - before - least) % n_loops
    left = n_layers - before - after
    fits = left > 0 and left % n_loops == 0
    said = f"{before} + ... + {after} of {n_layers}"
    require(fits, "layers", said, f"such that what is left, {left}, is a multiple of n_loops ({n_loops})")
    return before, left // n_loops


def folded(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of a layer, norms' weights multiplied into those that read them: W·diag(γ). The same function with
    norms of weight 1; in float32 or better."""
    wide = {name: layer[f"{name}.weight"] for name in MATRICES}
    wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in wide.items()}
    for norm, readers in READ_BY.items():
        wide |= {name: wide[name] * layer[f"{norm}.weight"] for name in readers}
    return wide


def low_rank(x: Tensor, rank: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A (rank, in), B (out, rank) with B·A nearest to x (out, in) of all of that rank (Eckart-Young): A has V's first
    rows, B U's first columns times their singular values. Beyond x's own rank: zeros.

    seen: E[y yᵀ] (in, in) of what x reads; (x − B·A) y is then least.
    """
    root, back = (None, None) if seen is None else roots(seen)
    u, s, v = torch.linalg.svd(x if root is None else x @ root, full_matrices=False)
    down, up = (v if back is None else v @ back)[:rank], (u * s)[:, :rank]
    missing = rank - down.shape[0]
    if missing <= 0:
        return down, up
    return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))


def matrix(layer: nn.Module, name: str, loop: int) -> Tensor:
    """What a recurrent layer multiplies by in this loop: its matrix and its delta."""
    found = layer.get_submodule(name)
    assert isinstance(found, Linear)
    if found.loop_A is None or found.loop_B is None:
        return found.weight
    return found.weight + found.loop_B[loop] @ found.loop_A[loop]


@torch.no_grad()
def share_kept(model: RecurrentDepthTransformer, made: RecurrentDepthTransformer) -> float:
    """Of the squared size of the matrices that were tied, what shared ones and deltas have; 1: all."""
    c = made.config
    layers, n = [*model.prelude_layers, *model.coda_layers], c.n_recurrent_layers
    lost = total = 0.0
    for j, layer in enumerate(made.recurrent):
        for i in range(c.n_loops):
            true = folded(dict(layers[c.n_prelude_layers + i * n + j].state_dict()))
            for name, x in true.items():
                lost += float((x - matrix(layer, name, i)).square().sum())
                total += float(x.square().sum())
    return 1 - lost / total


def _tied(
    parts: Layers,
    shared: Callable[[Tensor, Tensor | None], Tensor],
    rank: int,
    moments: Sequence[Moments] | None,
) -> dict[str, Tensor]:
    """The tensors of a recurrent layer whose loops are these layers."""
    found = {f"{norm}.weight": torch.ones_like(parts[0][f"{norm}.weight"]) for norm in READ_BY}
    wide = [folded(part) for part in parts]
    for name in MATRICES:
        tied, dtype = torch.stack([part[name] for part in wide]), parts[0][f"{name}.weight"].dtype
        seen = None if moments is None else torch.stack([each[name] for each in moments])
        weight = found[f"{name}.weight"] = shared(tied, seen).to(dtype)
        if rank:  # of what the rounded matrix leaves, so that deltas make up for rounding too
            read = [None] * len(tied) if seen is None else seen
            down, up = zip(*(low_rank(x - weight, rank, y) for x, y in zip(tied, read, strict=True)), strict=True)
            found |= {f"{name}.loop_A": torch.stack(down).to(dtype), f"{name}.loop_B": torch.stack(up).to(dtype)}
    return found


def _injection(c: ModelConfig, like: Tensor) -> dict[str, Tensor]:
    """Its tensors as a new model has them."""
    module = INJECTIONS[c.injection](c)
    if hasattr(module, "reset"):
        module.reset(torch.Generator())  # pyrefly: ignore
    return {f"injection.{name}": x.to(like) for name, x in module.state_dict().items()}
