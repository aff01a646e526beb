"""The models that experiments compare: the article's, the smallest looped one, plain ones, and what is taken away.

All read the same problems in the same order. Sizes are for one CPU core; looped arms differ in what their names say and
in nothing else, plain ones also train longer and at a rate of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ritornello.accounting import at_mean_loops, count_parameters, fit_ffn, flops_per_token
from ritornello.config import ModelConfig, TrainConfig
from ritornello.lab.cell import Cell, Role, looped
from ritornello.lab.tasks import Material

MAX_LOOPS = 8  # in training
STEPS = 2400
QUICK_STEPS: Mapping[Role, int] = {"looped": 1500, "ablation": 1500, "plain": 2000}

# The vocabulary is chains' for 32 nodes; a cell has its own task's.
# One dense layer, no prelude, no coda, no positions: the least that learns to follow edges.
DENSE = ModelConfig(
    vocab_size=64,
    n_token_tables=2,
    dim=64,
    n_prelude_layers=0,
    n_recurrent_layers=1,
    n_coda_layers=0,
    n_loops=MAX_LOOPS,
    max_seq_len=256,
    tie_embeddings=False,
    positions="none",
    n_heads=1,
    n_kv_heads=1,
    head_dim=64,
    ffn="dense",
    ffn_dim=176,
    initial_state="e",
    lora_rank=0,
    loop_embedding=False,
    halting="gate",
)

LOOPED = TrainConfig(
    steps=STEPS,
    batch_size=16,
    lr=2e-3,
    betas=(0.9, 0.98),
    warmup_steps=100,
    cooldown_fraction=0.3,
    final_lr_fraction=0.03,
    depth="uniform",
    min_loops=1,
    max_loops=MAX_LOOPS,
    mean_loops=(1 + MAX_LOOPS) / 2,
)

# Everything that the article names, at once.
ARTICLE: dict[str, Any] = {
    "n_prelude_layers": 1,
    "n_coda_layers": 1,
    # e has an RMS of 1: carried at .7 from the start it drowns what loop and coda write (experiments/LOG.md, entry 5)
    "input_init": 0.1,
    "initial_state": "zeros",
    "ffn": "moe",
    "n_experts": 16,
    "n_active_experts": 2,
    "n_shared_experts": 1,
    "expert_dim": 32,
    "lora_rank": 4,
    "loop_embedding": True,
}
NONE: Mapping[str, Any] = {}
TIED: dict[str, Any] = {"tie_embeddings": True}  # an answer is read by the vectors that questions are written in
NO_LORA: dict[str, Any] = {"lora_rank": 0}
NO_LOOP_EMBEDDING: dict[str, Any] = {"loop_embedding": False}
PLAIN: dict[str, Any] = {"n_recurrent_layers": 0, "halting": "none"}
PONDER: dict[str, Any] = {"ponder_weight": 3e-3}  # of ACT: experiments/LOG.md, entry 13
ONE_LOOP: dict[str, Any] = {"lr": 1e-3, "depth": "fixed", "min_loops": 1, "max_loops": 1, "mean_loops": 1.0}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What an arm changes of DENSE and LOOPED; `cell` what it changes of a Cell."""

    role: Role
    title: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    cell: Mapping[str, Any] = field(default_factory=dict)


def cost(model: ModelConfig, loops: float, *, seq_len: int = 64) -> float:
    """Training FLOPs per token at a mean number of loops."""
    how: Any = {"seq_len": seq_len, "training": True, "convention": "full"}
    return at_mean_loops(lambda n: flops_per_token(model, n_loops=n, **how), loops)


def _without(part: str, changes: Mapping[str, Any]) -> Arm:
    return Arm(role="ablation", title=f"article model without {part}", model={**ARTICLE, **changes})


def _one_expert(title: str, counted: str) -> Arm:
    """The article model with one expert, which every token gets: a dense loop, as wide as makes `counted` parameters
    the same. ffn_dim would not do: it is the width of prelude and coda too."""
    one: dict[str, Any] = {"n_experts": 1, "n_active_experts": 1, "n_shared_experts": 0}
    sizes = [count_parameters(replace(DENSE, **ARTICLE | one | {"expert_dim": width}))[counted] for width in (1, 2)]
    wanted = count_parameters(replace(DENSE, **ARTICLE))[counted]
    width = 1 + round((wanted - sizes[0]) / (sizes[1] - sizes[0]))
    return Arm(role="ablation", title=title, model=ARTICLE | one | {"expert_dim": width})


def _plain(title: str, n_layers: int, dim: int, n_parameters: int = 0) -> Arm:
    """A plain transformer that gets 4 times the article model's training FLOPs, with the same share of them at a
    falling rate.

    n_parameters: its feed-forward width is fitted to this total; 0: DENSE's.
    """
    shape = replace(DENSE, **PLAIN, n_prelude_layers=n_layers, dim=dim, head_dim=dim // DENSE.n_heads)
    shape = fit_ffn(shape, n_parameters) if n_parameters else shape
    model = PLAIN | {name: getattr(shape, name) for name in ("n_prelude_layers", "dim", "head_dim", "ffn_dim")}
    affordable = 4 * LOOPED.steps * cost(replace(DENSE, **ARTICLE), LOOPED.mean_loops) / cost(shape, 1)
    return Arm(role="plain", title=title, model=model, train=ONE_LOOP | {"steps": int(affordable)})


SIZE = count_parameters(replace(DENSE, **ARTICLE))["total"]
ARMS: dict[str, Arm] = {
    "article": Arm(role="looped", title="article model", model=ARTICLE),
    "article-no-lora": _without("LoRA", NO_LORA),
    "article-no-loop-embedding": _without("loop embedding", NO_LOOP_EMBEDDING),
    "article-no-signals": _without("LoRA and loop embedding", NO_LORA | NO_LOOP_EMBEDDING),
    "article-no-prelude": _without("prelude", {"n_prelude_layers": 0}),
    "article-no-coda": _without("coda", {"n_coda_layers": 0}),
    "article-bare": _without("prelude and coda", {"n_prelude_layers": 0, "n_coda_layers": 0}),
    "article-no-halting": _without("halting", {"halting": "none"}),
    # it starts from e, or the input would never arrive
    "article-no-injection": _without("injection", {"injection": "none", "initial_state": "e"}),
    "article-dense-active": _one_expert("article model, dense loop of equal active parameters", "active"),
    "article-dense-total": _one_expert("article model, dense loop of equal total parameters", "total"),
    "dense": Arm(role="looped", title="smallest looped model"),
    # those called tied are of systematic-generalisation, which fits their width and steps to its task
    "tied": Arm(role="looped", title="smallest looped model, tied", model=TIED),
    "anchored": Arm(role="looped", title="smallest looped model, tied, anchored", model={**TIED, "anchored": True}),
    # the best of 5 × 64, 3 × 80 and 8 × 48 after 500 to 1,500 steps: experiments/LOG.md, entry 6
    "plain-5x64": _plain("plain, the article model's parameters (5 × 64)", 5, 64, SIZE),
    "plain-depth": _plain("plain, equal depth", MAX_LOOPS, DENSE.dim),
    "plain-tied-5x32": Arm(
        role="plain",
        title="plain, equal parameters (5 × 32), tied",
        model={**TIED, **PLAIN, "n_prelude_layers": 5, "dim": 32, "head_dim": 32},
        train=ONE_LOOP,
    ),
    "plain-tied-depth": Arm(
        role="plain",
        title="plain, equal depth, tied",
        model={**TIED, **PLAIN, "n_prelude_layers": MAX_LOOPS},
        train=ONE_LOOP,
    ),
    "plain-one-layer": _plain("plain, one layer", 1, DENSE.dim),
    "writes": Arm(
        role="plain",
        title="plain, one layer, writes its hops",
        model={**PLAIN, "n_prelude_layers": 1},
        train=ONE_LOOP,
    ),
    "no-injection": Arm(role="ablation", title="no injection", model={"injection": "none"}),
    "slow-forgetting": Arm(
        role="ablation", title="slow forgetting, A = .9", model={"decay_init": 0.9, "input_init": 0.3}
    ),
    "bf16-carry": Arm(role="ablation", title="bfloat16 carry", cell={"bf16_carry": True}),
    "fixed-depth": Arm(
        role="ablation",
        title="always 5 loops in training",
        train={"depth": "fixed", "mean_loops": 5.0, "min_loops": 5, "max_loops": 5},
    ),
    "linear": Arm(role="ablation", title="linear injection", model={"injection": "linear"}),
    "add": Arm(role="ablation", title="additive injection", model={"injection": "add"}),
    "act-mixture": Arm(
        role="looped", title="ACT, mixture", model={"halting": "act", "read_out": "mixture"}, train=PONDER
    ),
    "act-last": Arm(role="looped", title="ACT, last state", model={"halting": "act"}, train=PONDER),
    "short-training": Arm(role="ablation", title="short training", train={"steps": STEPS * 3 // 10}),
}


def cell(
    arm: str,
    task: Material,
    *,
    seed: int,
    masked: bool,
    sizes: Mapping[str, int] = NONE,
    model: Mapping[str, Any] = NONE,
    **changes: Any,
) -> Cell:
    """The cell of an arm on a task; `model` changes its shape, `changes` its training, for example the steps."""
    chosen = ARMS[arm]
    shape: dict[str, Any] = {"vocab_size": task.vocab_size, "n_token_tables": task.n_token_tables}
    usual = looped(LOOPED, task.train_hops) if task.loops_say_hops and chosen.role != "plain" else LOOPED
    settings: dict[str, Any] = {**chosen.train, **changes}
    train = replace(usual, **settings, seed=seed)
    return Cell(
        arm=arm,
        role=chosen.role,
        task=task.name,
        seed=seed,
        model=replace(DENSE, **{**shape, **chosen.model, **model}),
        train=train,
        task_sizes=tuple(sizes.items()),
        hops=task.train_hops,
        masked=masked and chosen.role != "plain",
        **chosen.cell,
    )


def quick(arm: str, task: Material) -> Cell:
    """A cell of 3 minutes on one core: one seed, and fewer steps."""
    steps = QUICK_STEPS[ARMS[arm].role]
    return cell(arm, task, seed=0, masked=True, steps=steps)
