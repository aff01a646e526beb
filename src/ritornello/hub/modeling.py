"""The model behind transformers' interface: `RecurrentDepthTransformer` does the work."""

from dataclasses import dataclass, replace
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
from ritornello.hub.configuration import RitornelloConfig
from ritornello.hub.slots import Slots
from ritornello.model.attention import LatentAttention
from ritornello.model.context import Capture
from ritornello.model.initialize import initialize
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


class RitornelloLatentAttention(LatentAttention):
    """MLA whose kv_b_proj may be more than its weight, which alone absorption reads: an adapter around it."""

    def absorbs(self, n_queries: int, n_entries: int) -> bool:
        return isinstance(self.kv_b_proj, nn.Linear) and super().absorbs(n_queries, n_entries)


class TiedHead(nn.Linear):
    """The vocabulary as the head that it serves as, with nothing of its own: a head is a linear layer to who asks."""

    def __init__(self, model: "RitornelloForCausalLM") -> None:
        nn.Module.__init__(self)
        self.bias, self._model = None, [model]  # in a list it is no part of this  # pyrefly: ignore

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self._model[0].native.head_weight
        if name in ("out_features", "in_features"):
            return self.weight.shape[name == "in_features"]
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        return self._model[0].native.logits(input)


def adopt(model: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    """`model` in place, its parts known to transformers as such, its one number a vector: FSDP shards no scalars."""
    if not model.config.is_plain and model.loop_embedding_scale is not None:
        model.loop_embedding_scale = nn.Parameter(model.loop_embedding_scale.data.view(1))
    for module in list(model.modules()):
        if type(module) is Experts:
            module.__class__ = RitornelloExperts
            module.num_experts = len(module.down_proj)  # pyrefly: ignore
        if type(module) is LatentAttention:
            module.__class__ = RitornelloLatentAttention
    return model


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
        self.native.embed_tokens[0] = value
        self.native.config = replace(self.native.config, vocab_size=value.num_embeddings)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what was not loaded."""
        state = self.native.state_dict(keep_vars=True)
        loaded = {name: x.detach().clone() for name, x in state.items() if getattr(x, "_is_hf_initialized", False)}
        if len(loaded) < len(state) and not getattr(self.native, "_is_hf_initialized", False):
            initialize(self.native, _seed())
            for name, x in loaded.items():
                state[name].copy_(x)
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
        exit: ExitRule | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RitornelloOutput:
        """
        Args:
            input_ids: (B, T); or inputs_embeds (B, T, D).
            attention_mask: (B, S) over cached and new tokens, 0 at padding, on either side.
            position_ids: (B, T) or (1, T); by default padding is not counted. Without a mask and a cache, positions
                that begin anew begin a document: what is packed into a row sees itself only.
            past_key_values: any transformers cache; takes in what it does not hold.
            use_cache: default: as configured, and never in training.
            n_loops: of all tokens, or (B,) or (B, T); default: as configured.
            exit: lets tokens stop early; default: as configured.
        """
        c, training = self.config, self.training
        if use_cache is None:
            use_cache = c.use_cache and not training
        if self.gradient_checkpointing and training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        output_hidden_states = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_hidden_states and inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.rdt.embed(input_ids), None
        given = inputs_embeds if input_ids is None else input_ids
        require(given is not None, "input_ids", None, "given, or else inputs_embeds")
        assert given is not None
        shape = given.shape[0], given.shape[1]
        n_past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        documents = _documents(attention_mask, position_ids, shape, n_past)
        slots = None
        if past_key_values is not None:
            slots = Slots(self.rdt.config, past_key_values, None if documents is None else documents[:, :n_past])
        capture = Capture(frozenset("e")) if output_hidden_states else None
        out = self.rdt(
            input_ids,
            n_loops=c.depth if n_loops is None else n_loops,
            exit=c.exit if exit is None else exit,
            documents=None if documents is None else documents[:, n_past:],
            positions=None if position_ids is None else position_ids.clamp(min=0).expand(shape),
            inputs_embeds=inputs_embeds,
            cache=slots,
            key=Key(_seed()) if training else None,
            capture=capture,
            checkpoint=self.gradient_checkpointing and training,
            trajectory=bool(output_hidden_states),
            return_logits=False,
        )
        return RitornelloOutput(
            last_hidden_state=out.hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=self._states(inputs_embeds, capture, out) if capture is not None else None,
            loops_used=out.loops_used,
            balance_loss=out.aux.get("balance"),
            ponder_loss=out.aux.get("ponder"),
        )

    def _states(self, embedded: Tensor | None, capture: Capture, out: Output) -> tuple[Tensor, ...]:
        assert embedded is not None
        e = [x for _, x in capture.tensors.get("e", [])]
        loops = [self.rdt.read_out(state) for state in out.trajectory or []]
        return (embedded, *e, *loops, out.hidden)


class RitornelloForCausalLM(RitornelloPreTrainedModel, GenerationMixin):
    """The next token's logits, and the loss of `labels`."""

    def __init__(self, config: RitornelloConfig) -> None:
        super().__init__(config)
        self.model = RitornelloModel(config)
        self.lm_head = TiedHead(self) if config.tie_word_embeddings else None
        self.post_init()

    @classmethod
    def of(cls, model: RecurrentDepthTransformer, **options: Any) -> "RitornelloForCausalLM":
        """Behind this interface, the model as it is: nothing is copied. options: of `RitornelloConfig`."""
        with torch.device("meta"):
            found = cls(RitornelloConfig.of(model.config, **options))
        found.model.rdt = adopt(model)
        return found.train(model.training)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.native.head if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if new_embeddings is not self.lm_head:
            self.lm_head, self.native.head = None, new_embeddings  # pyrefly: ignore

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
        exit: ExitRule | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> RitornelloCausalLMOutput:
        """As `RitornelloModel.forward`, and

        Args:
            labels: (B, T), the tokens themselves: they are shifted here; -100 where nothing is to be predicted.
            logits_to_keep: of the last so many positions only, or of these (K,); 0: of all.
        """
        states = {name: kwargs.pop(name) for name in ("output_hidden_states",) if name in kwargs}
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            n_loops,
            exit,
            return_dict=True,
            **states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state
        head = self.native.logits if self.lm_head is None else self.lm_head  # around either may be an adapter
        logits = head(hidden if isinstance(kept, int) else hidden[:, kept])
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


def _documents(mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], n_past: int) -> Tensor | None:
    """(B, S) documents of all tokens, -1 padding; None: each row is one document, without padding."""
    if mask is not None:
        length = n_past + shape[1]
        fits = mask.ndim == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= length
        require(
            fits, "attention_mask", tuple(mask.shape), f"(B, S) = {(shape[0], length)}: padding, not what sees what"
        )
        mask = mask[:, :length] > 0  # beyond: a cache of fixed size
        return None if bool(mask.all()) else mask.long() - 1
    if positions is None or n_past or shape[1] == 1:
        return None
    begins = positions.diff(dim=-1) != 1
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.long().cumsum(-1), (1, 0)).expand(shape)
