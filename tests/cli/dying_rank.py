"""`maskopt` of a rank that the machine kills: when DYING_RANK has finished its first block, as if memory were short."""

import os
import signal

from maskopt.models.keeping import Keeping

_leave = Keeping.leave


def leave(self, stage, number, finished):
    if os.environ["RANK"] == os.environ["DYING_RANK"] and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _leave(self, stage, number, finished)


Keeping.leave = leave

if __name__ == "__main__":
    from maskopt.cli import main

    main()
