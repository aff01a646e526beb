"""How the processes of a run could be laid out: world size = replicate × shard × context × tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

from ritornello.accounting import PIECES
from ritornello.config import Gather, ModelConfig, require, require_int

LEAST = 1024  # tokens of a shared sequence that a process has, in layouts that are tried


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The axes have the names and meanings of `[parallel]` in a recipe; neighbours share `tensor` first.

    replicate: groups with a whole model each. shard: processes over which weights, gradients and optimizer states are
    spread (FSDP2), over those that share a sequence too. expert: of these, groups that share out the routed experts,
    tokens going to and fro. context: processes that share a sequence. tensor: processes that share heads, feed-forward
    widths and experts.
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    gather: Gather = "step"

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "expert", "context", "tensor"):
            require_int(f"layout.{name}", getattr(self, name), 1)
        ok = self.n_shards % self.expert == 0
        require(ok, "layout.expert", self.expert, f"a divisor of shard x context ({self.n_shards})")

    @property
    def n_shards(self) -> int:
        """Processes over which a weight is spread, that `tensor` has divided before."""
        return self.shard * self.context

    @property
    def n_processes(self) -> int:
        return self.n_readers * self.context * self.tensor

    @property
    def n_readers(self) -> int:
        """Groups of processes that read sequences of their own."""
        return self.replicate * self.shard

    @property
    def n_axes(self) -> int:
        return sum(size > 1 for size in (self.replicate, self.shard, self.expert, self.context, self.tensor))

    def __str__(self) -> str:
        axes = {name: getattr(self, name) for name in ("replicate", "shard", "expert", "context", "tensor")}
        said = ", ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one process"
        return said + (", looped layers put together at every loop" if self.gather == "loop" else "")


def refused(config: ModelConfig, layout: Layout, *, seq_len: int, per_node: int) -> str:
    """Why a model cannot be laid out so; "" if it can."""
    t, c = layout.tensor, config
    if t > per_node:
        return f"tensor {t}: a node has {per_node}"
    widths = {"n_heads": c.n_heads, "ffn_dim": c.ffn_dim}
    if c.attention == "gqa":
        widths["n_kv_heads"] = c.n_kv_heads
    if c.ffn == "moe":
        widths |= {"the shared experts' width": c.n_shared_experts * c.expert_dim, "n_experts": c.n_experts}
    for name, width in widths.items():
        if width % t:
            return f"tensor {t}: does not divide {name} ({width})"
    if layout.expert > 1 and (c.ffn != "moe" or c.is_plain or c.n_experts % (layout.expert * t)):
        return f"expert {layout.expert}: does not divide the routed experts"
    uneven = layout.context > 1 and seq_len % (PIECES * layout.context)
    return f"context {layout.context}: {PIECES} x it does not divide {seq_len} tokens" if uneven else ""


def layouts(config: ModelConfig, n_processes: int, *, seq_len: int, per_node: int) -> Iterator[Layout]:
    """Every layout of so many processes that the model allows."""
    for tensor in divisors(n_processes):
        for context in (n for n in divisors(n_processes // tensor) if n == 1 or seq_len >= LEAST * n):
            for shard in divisors(n_processes // tensor // context):
                for expert in divisors(shard * context):
                    sizes = {"shard": shard, "expert": expert, "context": context, "tensor": tensor}
                    layout = Layout(replicate=n_processes // tensor // context // shard, **sizes)
                    if not refused(config, layout, seq_len=seq_len, per_node=per_node):
                        yield layout


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
