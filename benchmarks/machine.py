"""What the machine can do at most: the largest rate of matrix multiplication, and how fast it reads memory."""

import torch

from benchmarks.timing import alone

SIZES = (512, 1024, 2048)
MEMORY_BYTES = 1 << 29  # far beyond any cache


def matmul_ceiling(dtype: torch.dtype, *, n: int = 5) -> float:
    """FLOPs per second of the fastest square matrix product."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / alone(lambda a=a, b=b: a @ b, n=n))
    return best


def bandwidth(*, n: int = 5) -> float:
    """Bytes per second read: the faster of two kernels that touch every number of a large matrix once."""
    matrix = torch.randn(MEMORY_BYTES // 4 // 4096, 4096)
    vector = torch.randn(4096)
    return MEMORY_BYTES / min(alone(lambda: matrix @ vector, n=n), alone(matrix.sum, n=n))
