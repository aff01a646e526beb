"""Language models as arms: plain transformers of two kinds, and looped ones with .59 times their parameters.

All read the same windows in the same order; so do the article's model and what is left of it without a part, which
`ablation` compares. The ratio is that of a 770M model to a 1.3B one, of all parameters,
vocabulary included. Looped models, plain ones and the article's have a rate of their own, the best of three for each
(experiments/LOG.md, entries 24 and 26).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ritornello.accounting import count_parameters, fit_ffn
from ritornello.config import ModelConfig, TrainConfig
from ritornello.lab.arms import ARMS, ONE_LOOP, PLAIN, Arm, cost
from ritornello.lab.cell import Cell
from ritornello.lab.tasks.text import Text

TEXT = Text()
RATIO = 0.59  # 770M : 1.3B
MEAN_LOOPS = 4  # in training, where nothing else is said
STEPS = 900
LOOPED_LR, PLAIN_LR, ARTICLE_LR = 1.6e-2, 4e-3, 8e-3

PLAIN_SHAPE = ModelConfig(
    vocab_size=TEXT.vocab_size,
    dim=64,
    n_prelude_layers=5,
    n_recurrent_layers=0,
    n_coda_layers=0,
    n_loops=MEAN_LOOPS,
    max_seq_len=TEXT.seq_len,
    n_heads=2,
    n_kv_heads=2,
    head_dim=32,
    ffn="dense",
    ffn_dim=176,
    lora_rank=0,
    loop_embedding=False,
)
N_SMALL = round(RATIO * count_parameters(PLAIN_SHAPE)["total"])
# A layer before, one that loops, one after. The loop starts at e: an arm without injection then differs in that alone.
LOOPED_SHAPE = fit_ffn(
    replace(PLAIN_SHAPE, n_prelude_layers=1, n_recurrent_layers=1, n_coda_layers=1, initial_state="e"), N_SMALL
)
READING = TrainConfig(
    steps=STEPS,
    batch_size=8,
    lr=LOOPED_LR,
    warmup_steps=40,
    depth="poisson",
    min_loops=1,
    mean_loops=MEAN_LOOPS,
    max_loops=4 * MEAN_LOOPS,
)
ONCE: dict[str, Any] = {"depth": "fixed", "min_loops": 1, "mean_loops": 1, "max_loops": 1}
FIXED: dict[str, Any] = {"depth": "fixed", "min_loops": MEAN_LOOPS, "max_loops": MEAN_LOOPS}


def _stem(title: str, n_layers: int, ffn_dim: int) -> Arm:
    """A plain transformer with all that a looped model has but its loops: what its middle layers read is normalised."""
    model = {"n_recurrent_layers": n_layers - 2, "ffn_dim": ffn_dim, "n_loops": 1}
    return Arm(role="ablation", title=title, model=model, train=ONCE)


def _plain(title: str, n_layers: int, ffn_dim: int) -> Arm:
    model = PLAIN | {"n_prelude_layers": n_layers, "n_coda_layers": 0, "ffn_dim": ffn_dim}
    return Arm(role="plain", title=title, model=model, train=ONE_LOOP | {"lr": PLAIN_LR})


_PER_TOKEN = [cost(*model, seq_len=TEXT.seq_len) for model in ((PLAIN_SHAPE, 1), (LOOPED_SHAPE, MEAN_LOOPS))]
EQUAL_FLOPS = round(STEPS * _PER_TOKEN[0] / _PER_TOKEN[1])
SMALL_SHAPE = fit_ffn(replace(PLAIN_SHAPE, n_prelude_layers=3), N_SMALL)
STEM_SHAPE = fit_ffn(replace(LOOPED_SHAPE, n_recurrent_layers=3), count_parameters(PLAIN_SHAPE)["total"])
TEXT_ARMS: Mapping[str, Arm] = {
    "rdt": Arm(role="looped", title=f"looped, {RATIO} of the parameters"),
    "rdt-flops": Arm(
        role="looped", title=f"looped, {RATIO} of the parameters, equal FLOPs", train={"steps": EQUAL_FLOPS}
    ),
    "rdt-8": Arm(
        role="looped",
        title=f"looped, {RATIO} of the parameters, twice the loops",
        model={"n_loops": 2 * MEAN_LOOPS},
        train={"mean_loops": 2 * MEAN_LOOPS, "max_loops": 8 * MEAN_LOOPS},
    ),
    "plain": _plain("plain", 5, PLAIN_SHAPE.ffn_dim),
    "plain-small": _plain(f"plain, {RATIO} of the parameters", 3, SMALL_SHAPE.ffn_dim),
    # what norm and injection are worth without loops: in the pilot, more than loops
    "stem": _stem("plain with the looped model's stem", 5, STEM_SHAPE.ffn_dim),
    "stem-small": _stem(f"plain with the looped model's stem, {RATIO} of the parameters", 3, LOOPED_SHAPE.ffn_dim),
    "unrolled": _stem(
        f"plain with the looped model's stem, the layers that {MEAN_LOOPS} loops unroll to",
        2 + MEAN_LOOPS,
        LOOPED_SHAPE.ffn_dim,
    ),
    "fixed": Arm(role="ablation", title=f"looped, always {MEAN_LOOPS} loops", train=FIXED),
    "fixed-none": Arm(
        role="ablation",
        title=f"looped, always {MEAN_LOOPS} loops, no injection",
        model={"injection": "none"},
        train=FIXED,
    ),
}


# Of chains alone: there a carry as large as the others' drowns what loop and coda write (experiments/LOG.md, entry 5).
ELSEWHERE = "input_init", "initial_state"
OTHER_RATES = {"article-dense-active": LOOPED_LR}  # the better of two


def article(arm: str) -> Arm:
    """The article's model, or one without a part, as a language model: an arm on chains with all that it names, in the
    shape and training of the looped models here but for the rate; each loop of training has a LoRA of its own."""
    chosen = ARMS[arm]
    named = {name: value for name, value in chosen.model.items() if name not in ELSEWHERE}
    model = {"n_loops": READING.max_loops, "halting": "gate"} | named
    return replace(chosen, model=model, train={"lr": OTHER_RATES.get(arm, ARTICLE_LR)})


def cell(arm: str, *, seed: int, **changes: Any) -> Cell:
    """The cell of a language model; `changes` of its training."""
    chosen = TEXT_ARMS[arm] if arm in TEXT_ARMS else article(arm)
    settings: dict[str, Any] = {**chosen.train, **changes}
    return Cell(
        arm=arm,
        role=chosen.role,
        task=TEXT.name,
        seed=seed,
        model=replace(LOOPED_SHAPE, **chosen.model),
        train=replace(READING, **settings, seed=seed),
        hops=TEXT.train_hops,
    )
