"""ritornello doctor"""

import json
from dataclasses import dataclass
from typing import Annotated

from ritornello.commands import Command, option


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """What this machine can run: versions, device, kernels. Paste it into a bug report."""

    json: Annotated[bool, option("Print JSON instead of text.")] = False

    def run(self) -> None:
        from ritornello import doctor

        found = doctor.report()
        print(json.dumps(found, indent=2) if self.json else doctor.text(found))
