"""The model behind transformers' interface: `RecurrentDepthTransformer` does the work."""

from copy import copy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ritornello.config import ExitRule, require
from ritornello.hub.configuration import RitornelloConfig, as_rule
from ritornello.hub.slots import Slots
from ritornello.model.context import Capture
from ritornello.model.initialize import initialize
from ritornello.model.lora import Linear
from ritornello.model.moe import Experts
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import Output
from ritornello.ops.noise import Key


@dataclass
class RitornelloOutput(BaseModelOutputWithPast):
    """As its base, and loops_used (B, T); balance_loss and ponder_loss, scalars, in training where the model has them.

    hidden_states: the embeddings, e, the state after each loop, and last_hidden_state, each (B, T, D).
    """

    loops_used: Tensor | None = None
    balance_loss: Tensor | None = None
    ponder_loss: Tensor | None = None


@dataclass
class RitornelloCausalLMOutput(CausalLMOutputWithPast):
    """As its base, and what `RitornelloOutput` adds."""

    loops_used: Tensor | None = None
    balance_loss: Tensor | None = None
    ponder_loss: Tensor | None = None


class RitornelloExperts(Experts):
    """Experts of which expert parallelism may leave this process some: the first `num_experts` of a choice's numbers.
    Choices of others then come as a number beyond, with weight 0."""

    num_experts: int

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, exact: bool = False) -> Tensor:
        return super().forward(x, indices.clamp(max=self.num_experts - 1), weights, exact)


def adopt(model: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    """`model` in place, for transformers to share out: its experts known as such, its one number a vector."""
    _vector(model)
    for module in list(model.modules()):
        if type(module) is Experts:
            module.__class__ = RitornelloExperts
            module.num_experts = len(module.down_proj)  # pyrefly: ignore
    return model


def _vector(model: RecurrentDepthTransformer) -> None:
    """FSDP shards no scalar."""
    if not model.config.is_plain and model.loop_embedding_scale is not None:
        model.loop_embedding_scale = nn.Parameter(model.loop_embedding_scale.data.view(1))


class RitornelloPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = RitornelloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["RecurrentDepthTransformer"]  # noqa: RUF012 - every loop would move the state about
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"injection", "router"}  # noqa: RUF012

    @property
    def native(self) -> RecurrentDepthTransformer:
        """The model itself."""
        return self.base_model.rdt  # pyrefly: ignore

    def get_input_embeddings(self) -> nn.Module:
        return self.native.embed_tokens[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        shape, fits = self.native.config, value.num_embeddings == self.native.config.vocab_size
        n = shape.vocab_size
        require(fits or not shape.value_embeddings, "vocab_size", value.num_embeddings, f"{n} with value_embeddings")
        self.native.embed_tokens[0] = value
        self.native.config = replace(self.native.config, vocab_size=value.num_embeddings)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what was not loaded."""
        state = self.native.state_dict(keep_vars=True).values()
        loaded = [x for x in state if getattr(x, "_is_hf_initialized", False)]
        if len(loaded) < len(state) and not getattr(self.native, "_is_hf_initialized", False):
            kept = [x.detach().clone() for x in loaded]
            initialize(self.native, _seed())
            for x, before in zip(loaded, kept, strict=True):
                x.copy_(before)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Tables of a vocabulary that grows are drawn as everywhere."""
        if type(module) in (nn.Embedding, nn.Linear):
            super()._init_weights(module)


class RitornelloModel(RitornelloPreTrainedModel):
    """Tokens to hidden states, in which the logits are linear."""

    def __init__(self, config: RitornelloConfig) -> None:
        super().__init__(config)
        self.rdt = adopt(RecurrentDepthTransformer(config.shape(), seed=_seed()))
        self.gradient_checkpointing = False
        for x in self.rdt.state_dict(keep_vars=True).values():
            x._is_hf_initialized = not x.is_meta  # drawn already
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | Tensor | None = None,
        exit: ExitRule | str | tuple[Any, ...] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RitornelloOutput:
        """
        Args:
            input_ids: (B, T); or inputs_embeds (B, T, D), rows as the table of embeddings has them.
            attention_mask: (B, S) over cached and new tokens, 0 at padding, on either side.
            position_ids: (B, T) or (1, T); by default padding is not counted. Without a mask and a cache, positions
                that begin anew begin a document: what is packed into a row sees itself only, and leaves no cache.
            past_key_values: any transformers cache; takes in what it does not hold.
            use_cache: default: as configured, and never in training.
            n_loops: of all tokens, or (B,) or (B, T); default: as configured.
            exit: lets tokens stop early: an ExitRule, its name, or (name, threshold, min_loops); default: as
                configured.
        """
        c, training = self.config, self.training
        _refuse_misspelt(kwargs)
        output_hidden_states = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds if c.embedding_scale == 1 else inputs_embeds * c.embedding_scale
        elif output_hidden_states and input_ids is not None and not c.value_embeddings:
            inputs_embeds, input_ids = self.rdt.embed(input_ids), None
        given = inputs_embeds if input_ids is None else input_ids
        require(given is not None and given.ndim > 1, "input_ids", None, "(B, T), or else inputs_embeds (B, T, D)")
        assert given is not None
        shape = given.shape[0], given.shape[1]
        packed = _packed(position_ids, shape) if attention_mask is None and past_key_values is None else None
        cache = self._cache(past_key_values, use_cache, packed=packed is not None)
        n_past = 0 if cache is None else int(cache.get_seq_length())
        documents = _documents(attention_mask, shape, n_past, cache) if packed is None else packed
        past, new = (None, None) if documents is None else documents.tensor_split((n_past,), 1)
        capture = Capture(frozenset("e")) if output_hidden_states else None
        out = self.rdt(
            input_ids,
            n_loops=c.depth if n_loops is None else n_loops,
            exit=c.exit if exit is None else as_rule(exit),
            documents=new,
            positions=None if position_ids is None else position_ids.clamp(min=0).expand(shape),
            inputs_embeds=inputs_embeds,
            cache=None if cache is None else Slots(self.rdt.config, cache, n_past, past),
            key=Key(_seed()) if training else None,
            capture=capture,
            checkpoint=self.gradient_checkpointing and training,
            trajectory=bool(output_hidden_states),
            return_logits=False,
        )
        return RitornelloOutput(
            last_hidden_state=out.hidden,
            past_key_values=cache,
            hidden_states=None if capture is None else self._states(given, capture, out),
            loops_used=out.loops_used,
            balance_loss=out.aux.get("balance"),
            ponder_loss=out.aux.get("ponder"),
        )

    def _cache(self, given: Cache | None, use_cache: bool | None, *, packed: bool) -> Cache | None:
        """What this pass reads and fills. Rows of several documents leave none: what follows would see all of them."""
        if given is not None:
            return given
        require(not (use_cache and packed), "use_cache", True, "False where position_ids begin anew within a row")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        return DynamicCache() if use_cache and not (self.gradient_checkpointing and self.training) else None

    def _states(self, given: Tensor, capture: Capture, out: Output) -> tuple[Tensor, ...]:
        embedded = given if given.is_floating_point() else self.rdt.embed(given)  # which layers read beside their ids
        e = [x for _, x in capture.tensors.get("e", [])]
        loops = [self.rdt.read_out(state) for state in out.trajectory or []]
        return (embedded, *e, *loops, out.hidden)


class RitornelloForCausalLM(RitornelloPreTrainedModel, GenerationMixin):
    """The next token's logits, and the loss of `labels`.

    lm_head: where embeddings serve as head, a layer that has their weight: what adapts a model looks for a head.
    """

    _tied_weights_keys = {"lm_head.weight": "model.rdt.embed_tokens.0.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "replicate"}  # noqa: RUF012

    def __init__(self, config: RitornelloConfig) -> None:
        super().__init__(config)
        self.model = RitornelloModel(config)
        with torch.device("meta"):
            self.lm_head = Linear(config.dim, config.vocab_size) if config.tie_embeddings else None
        self.post_init()
        if self.lm_head is None:
            self._tp_plan = {name: style for name, style in (self._tp_plan or {}).items() if name != "lm_head"}

    @classmethod
    def of(cls, model: RecurrentDepthTransformer, **options: Any) -> "RitornelloForCausalLM":
        """Behind this interface, the model as it is: no weight is copied. options: of `RitornelloConfig`."""
        with torch.device("meta"):
            found = cls(RitornelloConfig.of(model.config, **options))
        inner = copy(model)
        inner._parameters = dict(model._parameters)
        _vector(inner)
        found.model.rdt = inner
        found.tie_weights()
        return found.train(model.training)

    def get_output_embeddings(self) -> nn.Module:
        return self.native.head if self.lm_head is None else self.lm_head  # pyrefly: ignore

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        owner, name = (self.native, "head") if self.lm_head is None else (self, "lm_head")
        setattr(owner, name, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | Tensor | None = None,
        exit: ExitRule | str | tuple[Any, ...] | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RitornelloCausalLMOutput:
        """As `RitornelloModel.forward`, and

        Args:
            labels: (B, T), the tokens themselves: they are shifted here; -100 where nothing is to be predicted.
            logits_to_keep: of the last so many positions only, or of these (K,); 0: of all.
        """
        _refuse_misspelt(kwargs)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            n_loops,
            exit,
            output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state
        logits = self.get_output_embeddings()(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            extra = (self.config.balance_weight, out.balance_loss), (self.config.ponder_weight, out.ponder_loss)
            share = _share(labels, kwargs.get("num_items_in_batch"))
            loss = sum((weight * term * share for weight, term in extra if weight and term is not None), start=loss)
        return RitornelloCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            loops_used=out.loops_used,
            balance_loss=out.balance_loss,
            ponder_loss=out.ponder_loss,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: the model makes its own of it, for any cache."""
        return attention_mask


class RitornelloForSequenceClassification(GenericForSequenceClassification, RitornelloPreTrainedModel):
    """A score for each of `num_labels` read at a text's last token: classes, or a reward."""


def _seed() -> int:
    """Drawn from torch's own generator, so that what seeds it seeds models and their dropout."""
    return int(torch.randint(2**62, (), device="cpu"))


def _share(labels: Tensor, n_targets: Tensor | int | None) -> Tensor | float:
    """Of the batch that one optimizer step sees, these labels (B, T)."""
    return 1.0 if n_targets is None else (labels[:, 1:] != -100).sum() / n_targets


def _documents(mask: Tensor | None, shape: tuple[int, int], n_past: int, cache: Cache | None) -> Tensor | None:
    """(B, S) documents of all tokens, -1 padding; None: no padding."""
    if mask is None:
        return None
    length = n_past + shape[1]
    fixed = cache is not None and bool(cache.layers) and cache.get_max_length() > 0  # the mask may be as long as it
    fits = mask.ndim == 2 and mask.shape[0] == shape[0]
    fits = fits and (mask.shape[1] == length or (fixed and mask.shape[1] > length))
    require(fits, "attention_mask", tuple(mask.shape), f"(B, S) = {(shape[0], length)}: padding, not what sees what")
    mask = mask[:, :length] > 0
    return None if bool(mask.all()) else mask.long() - 1


def _packed(positions: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """(B, T) documents of rows in which positions begin anew; None: each row is one document."""
    if positions is None or shape[1] == 1:
        return None
    begins = positions.diff(dim=-1) != 1
    return nn.functional.pad(begins.long().cumsum(-1), (1, 0)).expand(shape) if bool(begins.any()) else None


def _refuse_misspelt(options: dict[str, Any]) -> None:
    """transformers passes on what a model may not know; what is nearly spelt like an option of ours is a mistake."""
    for name in options:
        near = get_close_matches(name, ("n_loops", "exit", "logits_to_keep"), n=1, cutoff=0.7)
        require(not near, name, options[name], "an option of this model", f"did you mean {near}?")
