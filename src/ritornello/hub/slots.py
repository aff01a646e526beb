"""A transformers cache, as the model sees it during one forward pass.

A cache layer holds one layer's keys and values at one loop: prelude, then coda, then loop by loop the recurrent layers,
so that deeper loops come after. All cache layers hold all tokens: at loops that a token has not run, those of its last
one, which is what deeper tokens read (a halted token is frozen). So whatever transformers does to a cache, reordering
beams, cropping what was guessed wrong, quantising, keeps its meaning.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ritornello.config import ModelConfig, require
from ritornello.model.cache import KeyValues
from ritornello.model.context import Loop
from ritornello.ops.subset import Subset


class Slots(KeyValues):
    """`cache` with n_past tokens, `past` (B, n_past) their documents, -1 padding; None: no padding among them."""

    def __init__(self, config: ModelConfig, cache: Cache, n_past: int, past: Tensor | None) -> None:
        self.config, self.cache, self.documents = config, cache, past
        self.length, self.n_new, self.loop = n_past, 0, 0
        self.new: dict[int, Tensor] = {}  # by layer, the entries of the new tokens at their last loop so far
        self.all: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, all tokens' keys and values at the last loop so far

    def begin(self, config: ModelConfig, shape: tuple[int, int], documents: Tensor | None) -> Tensor | None:
        self.n_new = shape[1]
        return documents

    def start_loop(self, loop: Loop, running: Tensor | None) -> None:
        assert isinstance(loop, int)
        self.loop = loop

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Tensor:
        assert isinstance(loop, int)
        before = self.new.get(layer)
        if before is not None:
            old = before if some is None else some.take(before)
            entry = old if self.config.kv_sharing == "first" else entry
            entry = entry if running is None else torch.where(running[..., None], entry, old)
        if some is not None:
            entry = some.spread(entry) if before is None else some.put(before, entry)
        self.new[layer] = entry
        if before is None or self.config.kv_sharing != "first":
            self.all[layer] = self._store(self._slot(layer, loop), layer, entry)
        found = self._entries(*self.all[layer])
        return found if some is None else found[some.rows]

    def commit(self) -> None:
        """The new tokens' entries of loops that they have not run, and tokens before them have."""
        c = self.config
        looped = range(c.n_prelude_layers, c.n_prelude_layers + c.n_recurrent_layers)
        for layer in looped if c.kv_sharing != "first" else ():
            slot = self._slot(layer, self.loop + 1)
            while self._holds(slot):
                self.cache.update(*self._split(self.new[layer]), slot)
                slot += c.n_recurrent_layers
        self.length += self.n_new

    def _slot(self, layer: int, loop: int) -> int:
        c = self.config
        place = layer - c.n_prelude_layers
        if 0 <= place < c.n_recurrent_layers:
            return c.n_prelude_layers + c.n_coda_layers + loop * c.n_recurrent_layers + place
        return layer if place < 0 else layer - c.n_recurrent_layers

    def _store(self, slot: int, layer: int, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, the new ones put in: those before may not have come so deep."""
        while len(self.cache.layers) <= slot:
            self.cache.layers.append(_another(self.cache.layers[-1]) if self.cache.layers else DynamicLayer())
        if self.length and not self._holds(slot):
            keys, values = (x[:, :, : self.length] for x in self.all[layer])
            self.cache.update(keys, values, slot)
        keys, values = self.cache.update(*self._split(entry), slot)
        end = self.length + self.n_new
        return keys[:, :, :end], values[:, :, :end]  # a cache of fixed size gives all that it has room for

    def _holds(self, slot: int) -> bool:
        """Whether it has the tokens before this pass: those that have it at all do, so that no device is waited for."""
        layers: list[Any] = self.cache.layers
        return slot < len(layers) and self.length > 0 and layers[slot].is_initialized

    def _split(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """An entry (B, T, W) as keys and values (B, G, T, K), or the latent and the rotary key (B, 1, T, R)."""
        if self.config.attention == "mla":
            latent, rotary = entry[:, None].tensor_split((self.config.kv_lora_rank,), -1)
            return latent, rotary
        keys, values = entry.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2).chunk(2, 1)
        return keys, values

    def _entries(self, keys: Tensor, values: Tensor) -> Tensor:
        if self.config.attention == "mla":
            return torch.cat((keys, values), -1)[:, 0]
        return torch.cat((keys, values), 1).transpose(1, 2).flatten(-2)


def _another(layer: object) -> DynamicLayer | StaticLayer:
    """An empty cache layer like `layer`, for loops beyond those that the cache was made for."""
    if type(layer) is StaticLayer:
        return StaticLayer(max_cache_len=layer.max_cache_len)
    remedy = "set config.default_loops before the cache is made"
    require(
        type(layer) is DynamicLayer, "n_loops", type(layer).__name__, "at most what this cache was made for", remedy
    )
    return DynamicLayer()
