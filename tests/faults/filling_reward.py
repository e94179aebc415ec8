"""A reward that fills the disk m in call number `at`; with `fails` it then fails too."""

import contextlib

calls = 0


def score(prompt, completion, *, at=0, fails=False, **columns):
    global calls
    calls += 1
    if calls == at:
        with contextlib.suppress(OSError), open("m/fill", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    if fails and calls >= at:
        raise RuntimeError("the reward's own error")
    return float(len(completion.encode()) % 2)
