"""How far transformers' interface is from the model itself: prints the table of docs/transformers.md.

Each number is the largest difference of a logit, beside the largest logit; `cache` decodes token by token from
transformers' caches, `padded` is in a batch with shorter rows, `deeper` at twice the model's loops.
"""

from collections.abc import Iterator

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from ritornello.config import ExitRule, ModelConfig
from ritornello.hub import RitornelloForCausalLM
from ritornello.model.rdt import RecurrentDepthTransformer

SMALL = ModelConfig(n_loops=4, n_experts=32, n_active_experts=4, lora_targets=("q", "o", "ffn"))
MLA = {"attention": "mla", "q_lora_rank": 48}
KINDS: dict[str, dict] = {
    "GQA, experts": {},
    "MLA, experts": MLA,
    "GQA, dense": {"ffn": "dense", "tie_embeddings": False},
    "exit by KL": {"ffn": "dense", "halting": "gate"},
    "ACT, mixture": {"ffn": "dense", "halting": "act", "read_out": "mixture"},
    "keys of the first loop": {"kv_sharing": "first"},
    "plain": {"n_recurrent_layers": 0},
}
EXITS = {"gate": ExitRule("kl", 0.2), "act": ExitRule("cumulative", 0.6)}
COLUMNS = ("whole", "cache", "fixed cache", "padded", "deeper")


def model(kind: str, dtype: torch.dtype) -> RitornelloForCausalLM:
    """New, but with low-rank deltas and loop embeddings that matter."""
    torch.manual_seed(0)
    inner = RecurrentDepthTransformer(ModelConfig(**{**vars(SMALL), **KINDS[kind]}), seed=0)
    with torch.no_grad():
        for name, x in inner.named_parameters():
            if name.endswith(("loop_B", "loop_embedding_scale")):
                x.normal_(std=0.1)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                x *= 8
            if name.startswith("halting.head."):  # or all tokens would stop at once
                x.normal_(std=2.0)
    return RitornelloForCausalLM.of(inner.to(dtype).eval())


@torch.inference_mode()
def row(kind: str, dtype: torch.dtype) -> Iterator[float]:
    found = model(kind, dtype)
    c, inner = found.config, found.native
    tokens = torch.randint(1, c.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    exit = EXITS.get(c.halting)
    own = inner(tokens, exit=exit).logits
    yield difference(found(tokens, exit=exit, use_cache=False).logits, own)
    for cache in (DynamicCache(), StaticCache(c, max_cache_len=32)):
        yield difference(decoded(found, tokens, cache, exit), own)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    padded = found(tokens, attention_mask=mask, exit=exit).logits[1:2, 7:]
    yield difference(padded, inner(tokens[1:2, 7:], exit=exit).logits)
    deep = {"n_loops": 2 * c.n_loops, "exit": exit}
    yield difference(found(tokens, **deep).logits, inner(tokens, **deep).logits)


def decoded(found: RitornelloForCausalLM, tokens: torch.Tensor, cache: Cache, exit: ExitRule | None) -> torch.Tensor:
    parts = [tokens[:, :8], *tokens[:, 8:].split(1, 1)]
    return torch.cat([found(x, past_key_values=cache, use_cache=True, exit=exit).logits for x in parts], 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    print("| model | dtype |", " | ".join(COLUMNS), "|")
    print("|---|---|" + "---|" * len(COLUMNS))
    for kind in KINDS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            numbers = [f"{x:.0e}".replace("e-0", "e-") if x else "0" for x in row(kind, dtype)]
            print("|", kind, "|", str(dtype).removeprefix("torch."), "|", " | ".join(numbers), "|")


if __name__ == "__main__":
    main()
