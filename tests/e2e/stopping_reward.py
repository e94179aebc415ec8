"""A reward that sends its process SIGTERM in the call whose number stands in the file stop_at of
the working directory.
"""

import os
import signal
from pathlib import Path


def score(prompt, completion, **columns):
    countdown = Path("stop_at")
    if countdown.exists():
        left = int(countdown.read_text()) - 1
        countdown.write_text(str(left))
        if left == 0:
            countdown.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
    return float(len(completion.encode()) % 4 == 0)
