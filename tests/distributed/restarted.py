"""`ritornello train` in which one process is killed in the first attempt, after two steps.

python -m torch.distributed.run ... -m tests.distributed.restarted ARGUMENTS
"""

import os
import sys

from ritornello import cli
from tests.distributed.faults import LAST, at, die

if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at(2, LAST, die)(int(os.environ["RANK"]), [])
    sys.exit(cli.main(sys.argv[1:]))
