"""Every setting of a model, a data set and a training run, as frozen dataclasses.

Importing this module is cheap: it needs neither torch nor numpy, so the command line can show its help at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

Attention = Literal["gqa", "mla"]
Positions = Literal["rope", "none"]
Ffn = Literal["moe", "dense"]
Activation = Literal["swiglu", "relu2"]
Norm = Literal["pre", "pre_post", "sandwich"]
Injection = Literal["lti", "linear", "add", "none"]
Halting = Literal["none", "act", "gate", "state_gate", "kl", "delta", "entropy"]
ReadOut = Literal["last", "mixture"]
InitialState = Literal["zeros", "e", "noise"]
StateNorm = Literal["none", "read", "loop"]
Gather = Literal["step", "loop"]
Precision = Literal["fp32", "bf16"]
CheckpointForm = Literal["auto", "plain", "sharded"]
LoraTarget = Literal["q", "k", "v", "o", "ffn"]
KvSharing = Literal["per_loop", "first"]
CachePolicy = Literal["per_loop", "last", "first"]
ExitName = Literal["hazard", "cumulative", "kl", "delta", "entropy"]
Measure = Literal["disagreement", "loss"]  # of what an exit risks
DataFormat = Literal["text", "chat"]

Entry = TypeVar("Entry")


def shown(value: object) -> str:
    """`value` for an error message: control characters escaped, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def require(ok: bool, name: str, value: object, allowed: str, remedy: str = "") -> None:
    """Raise the one kind of error a user's mistake gets: field, value, allowed range, remedy."""
    if not ok:
        raise ValueError(f"{name} = {shown(value)}: must be {allowed}" + (f"; {remedy}" if remedy else ""))


def require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    require(ok, name, value, allowed)


def require_float(name: str, value: object, low: float, high: float = math.inf, open_low: bool = False) -> None:
    allowed = f"a finite number in {'(' if open_low else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(ok and low <= value <= high and not (open_low and value == low), name, value, allowed)


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    near = get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    remedy = f"did you mean {near[0]!r}?" if near else ""
    require(value in choices, name, value, "one of " + ", ".join(map(str, choices)), remedy)


def pick(table: Mapping[str, Entry], name: str, field_name: str) -> Entry:
    """The entry called `name`; ValueError with the choices and the nearest name if there is none."""
    require_choice(field_name, name, tuple(table))
    return table[name]


_kinds = cache(get_type_hints)


def require_kinds(config: Any) -> None:
    """Check every field annotated as a Literal, a bool or a tuple of Literals."""
    for name, hint in _kinds(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            require_choice(name, value, get_args(hint))
        elif hint is bool:
            require(isinstance(value, bool), name, value, "True or False")
        elif get_origin(hint) is tuple:
            require(isinstance(value, tuple), name, value, "a tuple")
            for entry in value if get_origin(get_args(hint)[0]) is Literal else ():
                require_choice(name, entry, get_args(get_args(hint)[0]))


MAX_SIZE, MAX_LAYERS = 2**20, 1024  # what a file may ask for: no product of three sizes is beyond what torch can count
NOISE_STD = math.sqrt(2 / 5)  # of Huginn's initial state
MAX_LOOPS = 4096  # a bound on what one request may cost, not on the model: the state stays bounded for any number


class Yarn(NamedTuple):
    """See `ops.attention.slowed`."""

    factor: float
    length: int
    fast: float
    slow: float


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one recurrent-depth transformer. `n_recurrent_layers = 0` is a plain transformer.

    Names follow Llama and DeepSeek-V3. Sizes are in channels or layers, `init` values are at initialisation.
    """

    vocab_size: int = 264
    n_token_tables: int = 1  # ids per token, each with its own embedding table; their embeddings are summed
    dim: int = 128
    n_prelude_layers: int = 1
    n_recurrent_layers: int = 1
    n_coda_layers: int = 1
    n_loops: int = 16  # default depth, and the size of every per-loop table
    max_seq_len: int = 4096
    tie_embeddings: bool = True
    embedding_scale: float = 1.0  # what token embeddings are multiplied by, not the head that shares their table

    attention: Attention = "gqa"
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    yarn_factor: float = 1.0  # YaRN (2309.00071): how much longer than in training texts may be; 1: none
    yarn_length: int = 4096  # positions of that training
    yarn_fast: float = 32.0  # turns in `yarn_length` positions, from which a channel keeps its speed
    yarn_slow: float = 1.0  # and below which it is slowed down by the whole factor
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    q_lora_rank: int = 0  # MLA; 0: queries are projected directly
    kv_lora_rank: int = 64  # MLA
    qk_nope_head_dim: int = 32  # MLA
    qk_rope_head_dim: int = 16  # MLA
    v_head_dim: int = 32  # MLA
    qk_bias: bool = False  # GQA: queries and keys are shifted before they turn
    qk_norm: bool = False  # GQA: and are of root mean square 1 after it
    value_embeddings: tuple[int, ...] = ()  # GQA: layers whose values have a part that the token alone gives, gated
    kv_sharing: KvSharing = "per_loop"  # "first": every loop reads the keys and values of loop 0

    ffn: Ffn = "moe"  # of the recurrent layers; prelude and coda are dense
    ffn_dim: int = 384
    activation: Activation = "swiglu"  # "relu2": relu(x)² / 2 without a gate, where all layers are dense
    n_experts: int = 384
    n_active_experts: int = 8
    n_shared_experts: int = 1
    expert_dim: int = 32
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_expert_weights: bool = True
    router_scale: float = 1.0
    n_expert_groups: int = 1
    n_active_groups: int = 1
    router_bias_per_loop: bool = False

    norm: Norm = "pre"
    norm_eps: float = 1e-6
    normalize_input: bool = True  # False: e is what the prelude gives, as it is
    state_norm: StateNorm = "none"  # the last norm reads the state too: before the coda, or after each loop
    dropout: float = 0.0

    injection: Injection = "lti"
    injection_matrix: bool = False  # B a full matrix instead of a vector (lti)
    decay_init: float = 0.5  # A at initialisation
    rho_max: float = 1 - 2**-8  # the largest A: the last number below 1 in bfloat16; converters of other models set 1
    input_init: float = 0.7  # B at initialisation: with A = .5 the state's size stays within [.7, 1.4] of e's
    read_matrix: bool = False  # the coda reads C h instead of h
    initial_state: InitialState = "zeros"
    noise_std: float = NOISE_STD  # of an initial state that is noise
    carry_streams: int = 1
    loop_scale: tuple[float, float] = (1.0, 1.0)  # how much of the block's change stays: in loop 0, in later ones
    anchored: bool = False  # h <- norm(softmax(logits) E) after each loop

    lora_rank: int = 4  # 0: none
    lora_targets: tuple[LoraTarget, ...] = ("q", "o")
    loop_embedding: bool = True

    halting: Halting = "none"
    read_out: ReadOut = "last"

    output_init: Literal["effective_depth", "zero"] = "effective_depth"
    embedding_init: Literal["small", "unit"] = "small"  # small: as every matrix; unit: of variance 1

    def __post_init__(self) -> None:
        positive = "vocab_size dim max_seq_len n_heads n_kv_heads head_dim ffn_dim carry_streams"
        for name in positive.split():
            require_int(name, getattr(self, name), 1, MAX_SIZE)
        for name in "lora_rank q_lora_rank n_shared_experts".split():
            require_int(name, getattr(self, name), 0, MAX_SIZE)
        for name in "n_prelude_layers n_recurrent_layers n_coda_layers".split():
            require_int(name, getattr(self, name), 0, MAX_LAYERS)
        require_int("n_token_tables", self.n_token_tables, 1, MAX_LAYERS)
        require_int("n_loops", self.n_loops, 1, MAX_LOOPS)
        require_kinds(self)
        layers = self.n_prelude_layers + self.n_recurrent_layers + self.n_coda_layers
        require(layers > 0, "n_recurrent_layers", 0, "> 0 when n_prelude_layers and n_coda_layers are 0")
        require_float("embedding_scale", self.embedding_scale, 0, open_low=True)
        require_float("norm_eps", self.norm_eps, 0, 1, open_low=True)
        require_float("rope_theta", self.rope_theta, 1, open_low=True)
        require_float("dropout", self.dropout, 0, 0.99)
        require_float("router_scale", self.router_scale, 0, open_low=True)
        require_float("noise_std", self.noise_std, 0, open_low=True)
        self._check_attention()
        self._check_experts()
        self._check_recurrence()

    def _check_attention(self) -> None:
        if self.attention == "gqa":
            require(
                self.n_heads % self.n_kv_heads == 0,
                "n_heads",
                self.n_heads,
                f"a multiple of n_kv_heads ({self.n_kv_heads})",
            )
            rope_dim, name = self.head_dim, "head_dim"
        else:
            for name in ("qk_bias", "qk_norm", "value_embeddings"):
                value, none = getattr(self, name), type(getattr(self, name))()
                require(value == none, name, value, f"{none} with attention 'mla'")
            own = not {"k", "v"} & set(self.lora_targets)
            remedy = "a latent that every loop reads by one kv_b_proj has no delta of a loop"
            require(own, "lora_targets", self.lora_targets, "of q, o and ffn with attention 'mla'", remedy)
            for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
                require_int(name, getattr(self, name), 1, MAX_SIZE)
            rope_dim, name = self.qk_rope_head_dim, "qk_rope_head_dim"
            require_int(name, rope_dim, 2, MAX_SIZE)
        require(self.positions == "none" or rope_dim % 2 == 0, name, rope_dim, "even with rotary positions")
        layers = self.value_embeddings
        ascending = all(type(i) is int for i in layers) and list(layers) == sorted(set(layers))
        inside = ascending and all(0 <= i < self.n_layers for i in layers)
        require(inside, "value_embeddings", layers, f"ascending numbers of the {self.n_layers} layers, from 0")
        one = not layers or self.n_token_tables == 1
        require(one, "n_token_tables", self.n_token_tables, "1 with value_embeddings")
        require_float("yarn_factor", self.yarn_factor, 1)
        require_int("yarn_length", self.yarn_length, 1, MAX_SIZE)
        require_float("yarn_slow", self.yarn_slow, 0, open_low=True)
        require_float("yarn_fast", self.yarn_fast, self.yarn_slow)

    def _check_experts(self) -> None:
        if self.ffn != "moe":
            return
        require(self.activation == "swiglu", "activation", self.activation, "'swiglu' with ffn 'moe'")
        require_int("n_experts", self.n_experts, 1, MAX_SIZE)
        require_int("expert_dim", self.expert_dim, 1, MAX_SIZE)
        require_int("n_active_experts", self.n_active_experts, 1, self.n_experts)
        require_int("n_expert_groups", self.n_expert_groups, 1)
        require(
            self.n_experts % self.n_expert_groups == 0,
            "n_expert_groups",
            self.n_expert_groups,
            f"a divisor of n_experts ({self.n_experts})",
        )
        require_int("n_active_groups", self.n_active_groups, 1, self.n_expert_groups)
        reachable = self.n_active_groups * (self.n_experts // self.n_expert_groups)
        require(
            self.n_active_experts <= reachable,
            "n_active_experts",
            self.n_active_experts,
            f"<= the {reachable} experts of n_active_groups groups",
        )

    def _check_recurrence(self) -> None:
        require_float("rho_max", self.rho_max, 0, 1, open_low=True)
        require(
            0 < self.decay_init < self.rho_max, "decay_init", self.decay_init, f"in (0, rho_max = {self.rho_max:g})"
        )
        require_float("input_init", self.input_init, 0)
        require(len(self.loop_scale) == 2, "loop_scale", self.loop_scale, "two numbers: of loop 0, of later ones")
        for scale in self.loop_scale:
            require_float("loop_scale", scale, 0, 1, open_low=True)
        if self.is_plain:
            require(self.halting == "none", "halting", self.halting, "'none' without recurrent layers")
            require(self.state_norm == "none", "state_norm", self.state_norm, "'none' without recurrent layers")
            require(not self.read_matrix, "read_matrix", self.read_matrix, "False without recurrent layers")
        twice = self.anchored and self.state_norm == "loop"
        require(not twice, "state_norm", self.state_norm, "'none' or 'read' with an anchored state, which has its norm")
        require(
            not (self.anchored and self.carry_streams > 1),
            "carry_streams",
            self.carry_streams,
            "1 with an anchored state",
        )
        if self.injection == "none":
            require(
                self.initial_state == "e" or self.is_plain,
                "initial_state",
                self.initial_state,
                "'e' when injection is 'none', or the input never arrives",
            )
        require(
            self.read_out == "last" or self.halting == "act",
            "read_out",
            self.read_out,
            f"'last' with halting {self.halting!r}",
            "only 'act' learns the weights that a mixture needs",
        )

    @property
    def is_plain(self) -> bool:
        return self.n_recurrent_layers == 0

    @property
    def n_layers(self) -> int:
        """Distinct layers; prelude, recurrent and coda layers are numbered in this order."""
        return self.n_prelude_layers + self.n_recurrent_layers + self.n_coda_layers

    @property
    def kv_width(self) -> int:
        """Numbers one token holds per layer and slot of a KV cache."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def value_gate_width(self) -> int:
        """Channels that the gate of a value embedding reads, as in Parcae."""
        return min(32, self.dim)

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def yarn(self) -> Yarn | None:
        if self.yarn_factor == 1:
            return None
        return Yarn(self.yarn_factor, self.yarn_length, self.yarn_fast, self.yarn_slow)

    @property
    def needs_probe(self) -> bool:
        return self.halting in ("gate", "kl", "entropy")

    @property
    def effective_depth(self) -> float:
        """n_eff = P + C + R S²: the branches of one layer add up coherently over loops, decayed by A."""
        decay = self.decay_init if self.injection == "lti" else 1.0
        n = self.n_loops
        coherent = float(n) if decay == 1.0 else (1 - decay**n) / (1 - decay)
        return self.n_prelude_layers + self.n_coda_layers + self.n_recurrent_layers * coherent**2


@dataclass(frozen=True)
class ExitRule:
    """When a token stops looping at inference. `hazard` and `cumulative` read a learned halting head.

    `hazard`: the probability of stopping at this loop is >= threshold. `cumulative`: the summed probability is.
    `kl`, `delta`, `entropy`: the change of the prediction (nats), of the state (relative), or the uncertainty of the
    prediction (nats) is < threshold. No token stops before `min_loops`.
    """

    rule: ExitName
    threshold: float
    min_loops: int = 1

    def __post_init__(self) -> None:
        require_kinds(self)
        require_float("exit threshold", self.threshold, 0, 1.0 if self.rule in ("hazard", "cumulative") else math.inf)
        require_int("min_loops", self.min_loops, 1, MAX_LOOPS)


DEFAULT_THRESHOLDS: dict[ExitName, float] = {
    "hazard": 0.9,
    "cumulative": 0.99,
    "kl": 0.01,
    "delta": 0.03,
    "entropy": 0.5,
}
DEFAULT_RULES: dict[str, ExitName] = {
    "act": "cumulative",
    "gate": "hazard",
    "state_gate": "cumulative",
    "kl": "kl",
    "delta": "delta",
    "entropy": "entropy",
}


def exit_by(rule: ExitName, threshold: float | None = None, min_loops: int = 1) -> ExitRule:
    """The rule with its usual threshold, where none is given."""
    return ExitRule(rule, DEFAULT_THRESHOLDS[rule] if threshold is None else threshold, min_loops)


def default_exit(halting: str) -> ExitRule | None:
    """The exit rule a model with this kind of halting was made for; None for a model without."""
    rule = DEFAULT_RULES.get(halting)
    return exit_by(rule) if rule else None


ROW_FIELDS: dict[DataFormat, str] = {"text": "text", "chat": "messages"}  # what a row is read from by default


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text a run reads, and how it becomes sequences."""

    source: str = "stdlib"  # "stdlib", a .txt / .jsonl / .parquet file, a folder of them, or a Hugging Face name
    format: DataFormat = "text"  # chat: rows are conversations, of which the loss counts what the assistant says
    field: str = ""  # of a .jsonl, .parquet or Hugging Face row; "": text, or messages of a chat
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 256
    validation_fraction: float = 0.1  # of documents; "stdlib" splits by package instead
    packing: bool = True  # False: one document a row, padded
    isolate_documents: bool = True  # attention never crosses a document boundary
    streaming: bool = False  # rows are tokenised as they are needed, a block at a time, and shuffled within it
    stream_bytes: int = 1 << 26  # of training text in a block, whole documents

    def __post_init__(self) -> None:
        require_kinds(self)
        require_int("seq_len", self.seq_len, 1)
        require_int("stream_bytes", self.stream_bytes, 1)
        require_int("bpe_vocab_size", self.bpe_vocab_size, 260, 2**31)
        require_float("validation_fraction", self.validation_fraction, 0, 0.9, open_low=True)

    @property
    def row_field(self) -> str:
        return self.field or ROW_FIELDS[self.format]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Batch sizes are in sequences and global: independent of the number of processes."""

    steps: int = 1000
    batch_size: int = 16
    microbatch_size: int = 0  # 0: the whole batch at once
    seed: int = 0

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, everything else by AdamW
    lr: float = 1e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95  # Muon
    clip_norm: float = 1.0
    skip_spikes: float = 0.0  # leave out a step whose loss or gradient norm is so many standard deviations up; 0: never

    schedule: Literal["constant", "cosine", "trapezoid"] = "trapezoid"
    warmup_steps: int = 50
    cooldown_fraction: float = 0.5  # trapezoid: the share of steps in which the rate falls
    final_lr_fraction: float = 0.05

    precision: Precision = "fp32"
    checkpoint_activations: bool = False

    depth: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "poisson"
    mean_loops: float = 4.0
    min_loops: int = 1
    max_loops: int = 16
    depth_sigma: float = 0.5  # of the log-normal
    depth_ramp_steps: int = 0  # curriculum: the mean grows from min_loops to mean_loops over these steps
    backprop_loops: int = 0  # gradients pass through the last so many loops only; 0: all

    router_bias_rate: float = 1e-3
    router_bias_cooldown: float = 0.1  # the rate is 0 in this last share of steps
    router_bias_min_tokens: int = 1024  # per loop index, below which its bias is left alone
    balance_weight: float = 0.0  # sequence-level balance loss
    ponder_weight: float = 1e-2  # act
    probe_weight: float = 1.0  # the exit probe, on detached states
    halting_loss: Literal["frozen", "expected"] = "frozen"  # expected: sum over loops of p_t CE_t trains the gate too
    halting_prior: Literal["entropy", "geometric"] = "entropy"  # of the expected loss
    halting_prior_weight: float = 0.05
    halting_prior_rate: float = 0.2  # hazard of the geometric prior

    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 16
    eval_loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    save_every: int = 500
    checkpoint_form: CheckpointForm = "auto"  # sharded: each process writes its part; auto: where there are several
    save_in_background: bool = True  # training goes on from a copy in memory while a checkpoint is written
    keep_checkpoints: int = 2
    warm_start: str = ""  # a run or checkpoint whose weights this run starts from
    tensorboard: bool = False  # metrics.jsonl's figures also there; this and the next need their package
    trackio: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        require_kinds(self)
        for name in "steps batch_size log_every eval_every eval_batches save_every min_loops max_loops".split():
            require_int(name, getattr(self, name), 1)
        for name in "microbatch_size warmup_steps depth_ramp_steps backprop_loops router_bias_min_tokens".split():
            require_int(name, getattr(self, name), 0)
        require_int("keep_checkpoints", self.keep_checkpoints, 2)
        require_int("seed", self.seed, 0, 2**63 - 1)
        require_int("max_loops", self.max_loops, self.min_loops, MAX_LOOPS)
        require_float("mean_loops", self.mean_loops, self.min_loops, self.max_loops)
        for name in "lr muon_lr eps clip_norm".split():
            require_float(name, getattr(self, name), 0, open_low=True)
        not_negative = "weight_decay skip_spikes depth_sigma router_bias_rate balance_weight ponder_weight probe_weight"
        for name in f"{not_negative} halting_prior_weight".split():
            require_float(name, getattr(self, name), 0)
        for name in "cooldown_fraction final_lr_fraction router_bias_cooldown momentum".split():
            require_float(name, getattr(self, name), 0, 1)
        rate = self.halting_prior_rate
        require(0 < rate < 1, "halting_prior_rate", rate, "in (0, 1)")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)"
        )
        require(len(self.eval_loops) > 0, "eval_loops", self.eval_loops, "at least one number of loops")
        for n in self.eval_loops:
            require_int("eval_loops", n, 1, MAX_LOOPS)
        micro = self.microbatch_size or self.batch_size
        require(self.batch_size % micro == 0, "microbatch_size", micro, f"a divisor of batch_size ({self.batch_size})")

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch_size // (self.microbatch_size or self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run share the work. It changes no result beyond rounding, and may change on resuming."""

    replicate: int = 1  # groups of processes, each with a whole model
    shard: int = 0  # processes in a group, which hold a part of it each; 0: all that are left
    pipeline: int = 1  # stages over which the recurrent layers are spread; micro-batches go around once a loop
    context: int = 1  # processes that share out the tokens of each row
    tensor: int = 1  # processes that compute each layer of the same rows together: some heads and columns each
    expert: int = 1  # of the processes of a group, those that hold some routed experts each and send each other tokens
    gather: Gather = "step"  # looped layers are put together once a step, or for each loop
    stall_s: int = 900  # seconds without a step's end, with the evaluation and checkpoint due, that end a run; 0: none

    def __post_init__(self) -> None:
        require_kinds(self)
        require_int("shard", self.shard, 0)
        for name in ("replicate", "pipeline", "context", "tensor", "expert"):
            require_int(name, getattr(self, name), 1)
        require_int("stall_s", self.stall_s, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run, and what its directory's config.json holds."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        model, data, train = self.model, self.data, self.train
        require(
            data.seq_len <= model.max_seq_len,
            "data.seq_len",
            data.seq_len,
            f"<= model.max_seq_len ({model.max_seq_len})",
        )
        joint = model.halting == "act" or train.halting_loss == "expected"
        truncated = 0 < train.backprop_loops < (train.max_loops if train.depth != "fixed" else train.mean_loops)
        require(
            not (joint and truncated),
            "train.backprop_loops",
            train.backprop_loops,
            "0 when halting is trained jointly",
            "halting needs the gradient of every loop",
        )
        cut_off = truncated and model.injection == "none" and not model.is_plain
        require(
            not cut_off,
            "train.backprop_loops",
            train.backprop_loops,
            "0 with injection 'none', whose input enters before the first loop only",
        )
        plain_name = self.name.isprintable() and "/" not in self.name and "\\" not in self.name
        require(plain_name and self.name not in ("", ".", ".."), "name", self.name, "a plain name, without folders")
        require(
            train.halting_loss == "frozen" or model.read_out == "last",
            "train.halting_loss",
            train.halting_loss,
            "'frozen' with the read-out 'mixture', which is trained through its one prediction",
        )
        require(
            train.halting_loss == "frozen" or model.halting in ("act", "gate", "state_gate"),
            "train.halting_loss",
            train.halting_loss,
            f"'frozen' with halting {model.halting!r}",
        )
