"""Published models writing text by their own code, beside the same weights as ours.

Their loops over tokens are theirs: Huginn's `generate`, without and with its exit by the change of the state, and
transformers' `generate` for Ouro. What transformers 5 no longer hands them is put in its place here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Cache

from benchmarks import originals
from benchmarks.originals import CONVERTERS, Settings
from ritornello.model.carry import initial_state
from ritornello.model.rdt import RecurrentDepthTransformer

Caches = Literal["dynamic", "static"]


class Huginn:
    """Greedy, prompts of one length: their code has no mask for others. Every text starts from the noise that ours
    starts from, looked up here, which costs less than to draw theirs."""

    def __init__(self, settings: Settings, weights: dict[str, Tensor], ours: RecurrentDepthTransformer) -> None:
        original = originals.Huginn(settings, torch.float32)
        self.code, self.model = original.code, original.model
        own = {originals.huginn.ROPE_TABLE, "lm_head.weight"}
        originals._give(self.model, weights, own)
        e = torch.zeros(1, settings["block_size"], settings["n_embd"])
        self._noise, self._place, self.n_loops = initial_state("noise", e, ours.context(e)), 0, 0
        self.model.initialize_state = self._start
        self.model._get_initial_cache_position = _first_positions
        self._update, self.model._update_model_kwargs_for_generation = (
            self.model._update_model_kwargs_for_generation,
            self._next_position,
        )
        self._block, self.model.core_block_forward = self.model.core_block_forward, self._counted

    def _start(self, x: Tensor, scale: float = 1.0) -> Tensor:
        begin, self._place = self._place, self._place + x.shape[1]
        return self._noise[:, begin : self._place].expand_as(x)

    def _counted(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.n_loops += 1
        return self._block(*args, **options)

    def _next_position(self, outputs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = self._update(outputs, kwargs)
        return kwargs | {"cache_position": kwargs["cache_position"][-1:] + 1}

    @torch.inference_mode()
    def write(
        self,
        prompts: Tensor,
        n_new: int,
        n_loops: int,
        *,
        cache: Caches = "dynamic",
        exit: float | None = None,
        **how: Any,
    ) -> tuple[Tensor, float]:
        """(B, n_new) tokens, and loops of the block for each of them. exit: the threshold of `latent-diff`."""
        self._place = self.n_loops = 0
        leaving: Any = {"continuous_compute": False}
        if exit is not None:
            leaving = {"criterion": "latent-diff", "exit_threshold": exit}
        end = prompts.shape[1] + n_new
        with self._static_in_float32():
            found = self.model.generate(
                prompts, max_length=end, num_steps=n_loops, cache_implementation=cache, **leaving, **how
            )
        return found[:, prompts.shape[1] :], self.n_loops / n_new

    @contextmanager
    def _static_in_float32(self) -> Iterator[None]:
        """Their static cache is of bfloat16 whatever the weights are, and was made for a `Cache` without arguments."""
        kind = self.code.HuginnStaticCache

        class Float32(kind):
            def __init__(self, **options: Any) -> None:
                with patch.object(Cache, "__init__", lambda _: None):
                    super().__init__(**options | {"dtype": torch.float32})

        with patch.object(self.code, "HuginnStaticCache", Float32):
            yield


def _first_positions(length: int, device: torch.device, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"cache_position": torch.arange(length, device=device)}


class Ouro:
    """Greedy, by transformers' `generate` and their cache; shorter prompts are padded on the left."""

    def __init__(self, settings: Settings, weights: dict[str, Tensor], ours: RecurrentDepthTransformer) -> None:
        original = originals.Ouro(settings, torch.float32)
        self.code, self.model = original.code, original.model
        originals._give(self.model, weights, {"lm_head.weight"} if settings["tie_word_embeddings"] else set())
        self.code.create_causal_mask = _mask

    @torch.inference_mode()
    def write(
        self, prompts: Tensor, n_new: int, n_loops: int, *, mask: Tensor | None = None, exit: float | None = None
    ) -> tuple[Tensor, float]:
        """(B, n_new) tokens, and loops of the block for each of them: all. mask (B, T): 0 at padding; exit: of the
        cumulative probability."""
        self.model.model.total_ut_steps = n_loops
        leaving: Any = {"use_early_exit_gate": False} if exit is None else {"exit_threshold": exit}
        found = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts) if mask is None else mask,
            max_new_tokens=n_new,
            do_sample=False,
            use_cache=True,
            past_key_values=self.code.UniversalTransformerCache(n_loops * self.model.config.num_hidden_layers),
            pad_token_id=0,
            **leaving,
        )
        return found[:, prompts.shape[1] :], n_loops


def _mask(*, attention_mask: Tensor | None, cache_position: Tensor, **_: Any) -> Tensor | None:
    """(B, 1, T, S) bool, as transformers 4 made it; None without padding."""
    if attention_mask is None:
        return None
    places = torch.arange(attention_mask.shape[1], device=cache_position.device)
    return (places <= cache_position[:, None])[None, None] & attention_mask[:, None, None].bool()


WRITERS: dict[str, type[Huginn | Ouro]] = {"huginn": Huginn, "ouro": Ouro}


def converted(name: str, settings: Settings, weights: dict[str, Tensor]) -> RecurrentDepthTransformer:
    """Our model of their tensors."""
    config = CONVERTERS[name].config_from(settings)
    model = RecurrentDepthTransformer(config).eval()
    model.load_state_dict(CONVERTERS[name].from_theirs(weights, config))
    return model


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, T) with zeros on the left, and the mask that tells them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
