"""A model as transformers' configuration describes it: `ModelConfig`'s fields by their own names, the usual ones beside
them, and what a call gets that asks for no depth.
"""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, get_args

from transformers import PreTrainedConfig

from ritornello.config import (
    MAX_LOOPS,
    ExitName,
    ExitRule,
    ModelConfig,
    exit_by,
    require,
    require_choice,
    require_int,
)
from ritornello.hub.plans import Plan, expert_plan, fsdp_plan, tensor_plan

OPTIONS = ("default_loops", "exit_rule", "exit_threshold", "min_loops", "balance_weight", "ponder_weight")
SAID = ("rule", "threshold", "min_loops")
SHAPE = {field.name: field.default for field in fields(ModelConfig)}


class RitornelloConfig(PreTrainedConfig):
    """The shape of a model, every field of `ModelConfig`, and how it is run.

    Args:
        default_loops: depth of a call that gives no `n_loops`; None: `n_loops`, for which it was made.
        exit_rule: lets tokens stop early in a call that gives no `exit`; None: forces the depth. See `ExitRule`.
        exit_threshold, min_loops: of `exit_rule`.
        balance_weight: of the experts' balance loss, ponder_weight: of the loops used, beside the loss of `labels`.

    Raises:
        ValueError: a shape that cannot be, or an argument that is none but nearly spelt like one.
    """

    model_type = "ritornello"
    auto_map: ClassVar[dict[str, str]] = {}  # of code that a folder brings along; trl asks every configuration
    keys_to_ignore_at_inference = ["past_key_values", "loops_used", "balance_loss", "ponder_loss"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 - as the base class has it
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "n_heads",
        "num_experts": "n_experts",
        "num_experts_per_tok": "n_active_experts",
        "num_key_value_heads": "n_kv_heads",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        *,
        default_loops: int | None = None,
        exit_rule: ExitName | None = None,
        exit_threshold: float | None = None,
        min_loops: int = 1,
        balance_weight: float = 0.0,
        ponder_weight: float = 0.0,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        for name, default in SHAPE.items():
            value = given.pop(name, default)
            setattr(self, name, tuple(value) if isinstance(default, tuple) else value)
        for name in given:
            near = get_close_matches(name, (*SHAPE, *OPTIONS), n=1, cutoff=0.85)
            require(not near, name, given[name], "an argument of this configuration", f"did you mean {near}?")
        self.default_loops, self.exit_rule, self.exit_threshold = default_loops, exit_rule, exit_threshold
        self.min_loops, self.balance_weight, self.ponder_weight = min_loops, balance_weight, ponder_weight
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(**given)
        require(self.shape().n_token_tables == 1, "n_token_tables", self.n_token_tables, "1: one id a token")
        require_int("min_loops", min_loops, 1, MAX_LOOPS)
        _ = self.depth, self.exit

    def shape(self) -> ModelConfig:
        """The model's own configuration."""
        values: dict[str, Any] = {name: getattr(self, name) for name in SHAPE}
        tuples: dict[str, Any] = {name: tuple(values[name]) for name in SHAPE if isinstance(SHAPE[name], tuple)}
        return ModelConfig(**values | tuples)

    @classmethod
    def of(cls, shape: ModelConfig, **options: Any) -> "RitornelloConfig":
        """The configuration of a model of this shape."""
        return cls(**{name: getattr(shape, name) for name in SHAPE}, **options)

    @property
    def depth(self) -> int:
        """Loops of a call that gives no `n_loops`."""
        if self.default_loops is None:
            return self.n_loops
        require_int("default_loops", self.default_loops, 1, MAX_LOOPS)
        return self.default_loops

    @property
    def exit(self) -> ExitRule | None:
        """The exit rule of a call that gives none."""
        return exit_rule(self.exit_rule, self.exit_threshold, self.min_loops)

    @property
    def base_model_tp_plan(self) -> Plan:  # pyrefly: ignore
        return tensor_plan(self.shape())

    @property
    def base_model_ep_plan(self) -> Plan | None:  # pyrefly: ignore
        return expert_plan(self.shape())

    @property
    def base_model_fsdp_plan(self) -> Plan:  # pyrefly: ignore
        return fsdp_plan(self.shape())

    @property
    def num_hidden_layers(self) -> int:
        """Layers as a cache counts them: each loop's keys and values are a layer of their own."""
        looped = self.n_recurrent_layers * (1 if self.kv_sharing == "first" else self.depth)
        return self.n_prelude_layers + looped + self.n_coda_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        raise NotImplementedError("set n_prelude_layers, n_recurrent_layers, n_coda_layers or default_loops")


def exit_rule(rule: ExitName | None, threshold: float | None = None, min_loops: int = 1) -> ExitRule | None:
    """The rule of this name with its threshold, by default the one it has everywhere; None: none."""
    if rule is None:
        require(threshold is None, "exit_threshold", threshold, "given with exit_rule")
        return None
    require_choice("exit_rule", rule, get_args(ExitName))
    return exit_by(rule, threshold, min_loops)


def as_rule(given: Any) -> ExitRule:
    """An exit rule as it is, by its name, by (name, threshold, min_loops), or by another copy of this code."""
    if isinstance(given, str):
        return exit_rule(given)  # type: ignore[arg-type, return-value]
    parts = given if isinstance(given, tuple) else [getattr(given, name, None) for name in SAID]
    require(parts[0] is not None, "exit", given, "an ExitRule, its name, or (name, threshold, min_loops)")
    return exit_rule(*parts)  # type: ignore[return-value]
