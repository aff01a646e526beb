"""What transformers' Trainer has to be told of a looped model with experts."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ritornello.config import TrainConfig, require
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import Output
from ritornello.train.router import update_router_bias
from ritornello.train.schedule import router_bias_rate


@dataclass
class RouterBias(TrainerCallback):
    """Balances the experts as this package's own training does: after each optimizer step their selection bias moves
    towards an even load, by the rate of `train` (2412.19437, §2.1.2).

    Raises:
        ValueError: as training begins, for a model without experts, or one whose routers are not trained, as under an
            adapter: the bias is no part of what is saved then.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    _load: Tensor | None = field(default=None, init=False)
    _hook: Any = field(default=None, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _native(kwargs["model"])
        routed = model.config.ffn == "moe" and not model.config.is_plain
        require(routed, "model", f"ffn = {model.config.ffn!r}", "one with experts")
        trained = all(p.requires_grad for name, p in model.named_parameters() if "router" in name)
        require(trained, "model", "routers that are not trained", "one whose routers are", "leave RouterBias out")
        self._load, self._hook = None, model.register_forward_hook(self._count)

    def _count(self, module: nn.Module, _: Any, out: Output) -> None:
        if module.training and torch.is_grad_enabled():
            assert out.routing is not None
            self._load = out.routing.load + (0 if self._load is None else self._load)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        load, self._load = self._load, None
        rate = router_bias_rate(replace(self.train, steps=state.max_steps), state.global_step)
        if load is not None and rate:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load)
            update_router_bias(_native(kwargs["model"]), load, rate=rate, min_tokens=self.train.router_bias_min_tokens)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook.remove()


def _native(model: nn.Module) -> RecurrentDepthTransformer:
    """The model within whatever is around it."""
    found = next((module for module in model.modules() if isinstance(module, RecurrentDepthTransformer)), None)
    require(found is not None, "model", type(model).__name__, "a Ritornello model")
    assert found is not None
    return found
