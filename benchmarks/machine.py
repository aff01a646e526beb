"""What the machine can do at most: the largest rate of matrix multiplication, and how fast it reads memory."""

import torch

from benchmarks.timing import Work, seconds

SIZES = (512, 1024, 2048, 4096)
MEMORY_BYTES = 1 << 29  # far beyond any cache


def fastest(work: Work, *, n: int = 10) -> float:
    """A limit is what was reached once."""
    work()
    return min(seconds(work) for _ in range(n))


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest square matrix product."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / fastest(lambda a=a, b=b: a @ b))
    return best


def bandwidth() -> float:
    """Bytes per second read: the faster of two kernels that touch every number of a large matrix once."""
    matrix = torch.randn(MEMORY_BYTES // 4 // 4096, 4096)
    vector = torch.randn(4096)
    return MEMORY_BYTES / min(fastest(lambda: matrix @ vector), fastest(matrix.sum))
