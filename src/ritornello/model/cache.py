"""Where attention puts a token's keys and values, and what it finds there.

One entry is (B, T, kv_width): GQA's keys and values side by side, or MLA's latent and rotary key. Attention knows
nothing of loops, slots or other tokens; the model nothing of storage.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ritornello.config import MAX_LOOPS, CachePolicy, ModelConfig, require, require_choice, require_int
from ritornello.model.context import Loop
from ritornello.ops.ragged import Ragged
from ritornello.ops.subset import Subset


class KeyValues(ABC):
    """The interface: `put` is called once per layer and loop."""

    @abstractmethod
    def put(
        self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None
    ) -> Tensor | Ragged:
        """Take the entries (B, T, W) of this pass's tokens, give those of all tokens they attend to, (B, S, W), or by
        groups of tokens.

        `running` (B, T) or (B, 1) bool is False for a token that has halted: its entry stays that of its last loop.
        `some`: the pass has only these tokens of a batch; entry, running and what is given are theirs.
        """


class Passing(KeyValues):
    """No cache: the tokens attend to each other. `previous` are the entries of the loop before, by layer."""

    def __init__(self, previous: dict[int, Tensor] | None = None, *, share_first: bool = False) -> None:
        self.previous = previous
        self.share_first = share_first
        self.entries: dict[int, Tensor] = {}

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Tensor:
        if self.previous is not None:
            old = self.previous[layer] if some is None else some.take(self.previous[layer])
            if self.share_first:
                first = loop == 0 if isinstance(loop, Tensor) else torch.full((1, 1), loop == 0, device=entry.device)
                entry = torch.where(first[..., None], entry, old)
            if running is not None:
                entry = torch.where(running[..., None], entry, old)
        if some is not None:
            entry = some.spread(entry) if self.previous is None else some.put(self.previous[layer], entry)
        self.entries[layer] = entry
        return entry if some is None else entry[some.rows]


class Cache(KeyValues):
    """A preallocated cache for `batch_size` sequences that grow together, up to `max_len` tokens.

    Recurrent layers have a slot for each loop; a token is stored up to its last loop and read at min(loop, last).
    `policy`: `per_loop` is exact. `last`: within a pass each loop has its own entries, afterwards each token keeps its
    last: one slot, an approximation. `first`: every loop reads the entries of loop 0: one slot, exact for a model that
    was trained so (`kv_sharing`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_len: int,
        n_loops: int | None = None,
        policy: CachePolicy = "per_loop",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("max_len", max_len, 1)
        n_loops = config.n_loops if n_loops is None else n_loops
        require_int("n_loops", n_loops, 1, MAX_LOOPS)
        require_choice("policy", policy, ("per_loop", "last", "first"))
        require(dtype.is_floating_point, "dtype", dtype, "a floating-point type")
        self.policy: CachePolicy = "first" if config.kv_sharing == "first" else policy
        self.n_slots = n_loops if self.policy == "per_loop" else 1
        self.config, self.batch_size, self.max_len = config, batch_size, max_len
        loops = range(config.n_prelude_layers, config.n_prelude_layers + config.n_recurrent_layers)
        shape = (batch_size, max_len, config.kv_width)
        self.slots = [
            torch.zeros(self.n_slots if layer in loops else 1, *shape, dtype=dtype, device=device)
            for layer in range(config.n_layers)
        ]
        self.last = torch.zeros(batch_size, max_len, dtype=torch.int64, device=device)
        self.length = self.n_new = self.n_run = 0  # tokens stored, tokens on their way, loops that these have run
        self.documents: Tensor | None = None
        self.new_documents: Tensor | None = None
        self.shallowest = self.n_slots - 1  # every token stored so far has at least the slots 0..shallowest

    def begin(self, config: ModelConfig, shape: tuple[int, int], documents: Tensor | None) -> Tensor | None:
        """Make room for (B, T) new tokens. Returns their documents, which continue the stored ones when not given."""
        batch, n_new = shape
        require(config == self.config, "cache", "another model's", "made for this model's configuration")
        require(batch == self.batch_size, "cache", f"batch size {self.batch_size}", f"for {batch} sequences")
        room = self.max_len - self.length
        require(n_new <= room, "tokens", f"{n_new} new", f"at most {room} for this cache (max_len {self.max_len})")
        self.n_new, self.n_run = n_new, 0
        if documents is None and self.documents is not None:
            documents = self.documents[:, -1:].expand(batch, n_new)
        if documents is not None and self.documents is None:
            require(self.length == 0, "documents", "given", "given from the first token on")
        self.new_documents = documents
        return documents

    def start_loop(self, loop: Loop, running: Tensor | None) -> None:
        """Called before each loop: note how deep the new tokens have come."""
        assert isinstance(loop, int), "this cache moves all sequences through the loops together"
        if self.policy == "per_loop" and loop >= self.n_slots:  # a branch: compiled, these numbers may be symbolic
            require(False, "cache", f"{self.n_slots} loops", f"> {loop} loops")
        self.n_run = loop + 1
        now = self.last[:, self.length : self.length + self.n_new]
        if running is None:
            now.fill_(loop)
        else:
            now.copy_(torch.where(running, loop, now))
            self.shallowest = -1 if loop == 0 else min(self.shallowest, loop - 1)

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Tensor:
        assert isinstance(loop, int), "this cache moves all sequences through the loops together"
        slots, end, device = self.slots[layer], self.length + self.n_new, entry.device
        rows = torch.arange(self.batch_size, device=device) if some is None else some.rows
        slot = 0 if (one := slots.shape[0] == 1) else loop
        if not (one and loop > 0 and self.policy == "first"):
            at = self.length + (torch.arange(self.n_new, device=device)[None] if some is None else some.tokens)
            where = (torch.full_like(at, slot), rows[:, None], at)  # a slice would be compiled anew for each loop
            if one and running is not None and self.policy == "last":
                entry = torch.where(running[..., None], entry, slots[where])
            slots.index_put_(where, entry.to(slots.dtype))
        if one or loop <= self.shallowest:
            found = slots.select(0, slot).narrow(1, 0, end)
            return found if some is None else found[rows]
        own = self.last[rows, :end].clamp(max=loop)
        return slots[own, rows[:, None], torch.arange(end, device=device)]

    def commit(self) -> None:
        """The new tokens have passed through every layer: keep them."""
        if self.n_run:
            self.shallowest = min(self.shallowest, self.n_run - 1)
        if self.new_documents is not None:
            parts = (self.documents, self.new_documents)
            self.documents = torch.cat([part for part in parts if part is not None], 1)
        self.length += self.n_new
