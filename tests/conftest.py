"""What every test gets: one thread, fixed seeds, and no network."""

import os
import random
import socket
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts, and for child processes: pytest-xdist fills the cores

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """No test depends on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: tuple[str, int] | str) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield


def pytest_configure(config: pytest.Config) -> None:
    """Markers of transformers' own tests, which tests/hub/test_common.py runs."""
    flash = ("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test")
    for name in ("accelerate_tests", *flash, "slow", "torch_compile_test"):
        config.addinivalue_line("markers", f"{name}: of transformers")
