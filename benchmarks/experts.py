"""The mixture of experts alone, forward and backward, beside one grouped product over the sorted tokens."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import BATCH, DTYPES, mixture
from benchmarks.timing import paired
from ritornello.ops.experts import experts, experts_grouped, experts_ref

SPREAD = 0.1  # deviation of what an expert's scores have in common: the fullest has two to four times the mean


def rows(shape: str, dtype: str, *, n: int, ceiling: float) -> Iterator[dict[str, Any]]:
    c, (n_sequences, length) = mixture(shape), BATCH[shape]
    n_tokens = n_sequences * length
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    common = SPREAD * draw(c.n_experts)
    indices = (draw(n_tokens, c.n_experts) + common).topk(c.n_active_experts, -1).indices
    sizes = ((n_tokens, c.dim), (c.n_experts, 2 * c.expert_dim, c.dim), (c.n_experts, c.dim, c.expert_dim))
    x, gate_up, down = ((draw(*size) / size[-1] ** 0.5).to(DTYPES[dtype]).requires_grad_() for size in sizes)
    weights, grad = draw(n_tokens, c.n_active_experts).softmax(-1).requires_grad_(), draw(n_tokens, c.dim).to(x.dtype)

    def run(path: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = path(x, gate_up, down, indices, weights)
        return y, *torch.autograd.grad(y, (x, gate_up, down, weights), grad)

    for found, defined in zip(run(experts), run(experts_ref), strict=True):
        assert (found - defined).norm() <= (1e-5 if dtype == "fp32" else 0.03) * defined.norm()
    found = paired(lambda: run(experts), lambda: run(experts_grouped), n=n)
    flops = 3 * 2 * n_tokens * c.n_active_experts * 3 * c.dim * c.expert_dim
    yield {
        "bench": "experts",
        "shape": shape,
        "attention": "",
        "dtype": dtype,
        "metric": f"seconds, {n_tokens} tokens, forward and backward",
        **asdict(found),
        "peer_name": "one grouped matmul",
        "ceiling": ceiling,
        "utilisation": flops / found.ours / ceiling,
    }
