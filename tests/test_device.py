import pytest
import torch

from ritornello.device import available, fallbacks, pick_device


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert pick_device() == torch.device("cpu")
    pretend(monkeypatch, mps=True)
    assert pick_device() == torch.device("mps")
    pretend(monkeypatch, cuda=2, mps=True)
    assert pick_device() == torch.device("cuda")
    assert available() == ("cuda", "mps", "cpu")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu", "", "cpu:0", "cpu:"])
def test_what_is_absent_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch)
    with pytest.raises(ValueError, match="cpu"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:-1", "cuda:x", "cuda:"])
def test_the_index_must_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, cuda=2)
    with pytest.raises(ValueError, match="0 to 1"):
        pick_device(name)


def test_fallbacks_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert "no CUDA device found: running on cpu" in fallbacks(torch.device("cpu"))
    pretend(monkeypatch, cuda=1)
    assert "CUDA is present but was not chosen: running on cpu" in fallbacks(torch.device("cpu"))
    assert fallbacks(torch.device("cuda")) != fallbacks(torch.device("cpu"))
