"""Fetch transformers' own model tests, which are in its source package only, for tests/hub/test_common.py."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

TARGET = Path(sys.prefix) / "transformers-tests"


def main() -> None:
    """Into the environment that runs this, those of the version that is installed there."""
    package = f"transformers=={version('transformers')}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "-d", folder, package], check=True)
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                path = Path(member.name)
                if member.isfile() and path.parent.name == "tests" and path.suffix == ".py":
                    member.name = path.name
                    source.extract(member, TARGET, filter="data")
    print(TARGET)


if __name__ == "__main__":
    main()
