"""`maskopt` in several processes, one of which the machine may kill, as if memory were short.

Under torchrun, or with a number of processes as first argument. The one of DYING_RANK ends after its first block.
"""

import os
import signal
import sys

from maskopt.cli import main
from maskopt.models.keeping import Keeping
from tests.processes import forked_ranks

_leave = Keeping.leave


def leave(self, stage, number, finished):
    if os.environ["RANK"] == os.environ.get("DYING_RANK") and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _leave(self, stage, number, finished)


Keeping.leave = leave

if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    count = int(sys.argv.pop(1))
    sys.exit(max(map(abs, forked_ranks(count, main))))
