import builtins
import getpass
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello import cli, doctor


def test_report_answers_what_a_bug_report_needs() -> None:
    found = doctor.report()
    assert json.loads(json.dumps(found))["packages"]["torch"] == torch.__version__
    assert found["kernels"]["attention math"] == "yes"
    assert set(found["kernels"].values()) <= {"yes", "no"}
    named = {"ritornello", "python", "system", "packages", "device", "fallbacks", "threads", "memory", "disk"}
    assert named <= set(found)


def test_report_is_readable_and_names_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(line.partition(": ")[2] for line in text.splitlines())
    assert str(Path.home()) + os.sep not in text and str(Path.cwd()) not in text
    assert getpass.getuser() not in text.replace("root", "") or getpass.getuser() == "root"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert "kernels" in json.loads(capsys.readouterr().out)


def test_a_broken_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file\nand more")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = doctor.report()
    assert found["torch error"] == "libtorch_cpu.so: cannot open shared object file"
    assert "kernels" not in found and found["disk"]
