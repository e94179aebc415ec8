"""The process that renders chat templates: `python -m tandem.engine.data.template_worker FD`.

A template is a program that came with a model: it may loop forever, or fill the memory. Here it has
bounds on both. Only engine/data/templates.py starts this program.
"""

from __future__ import annotations

import datetime
import random
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

DEADLINE = 4  # seconds of CPU time for one conversation
MEMORY = 2 << 30  # bytes of address space
LONGEST = 256 << 20  # characters of a rendered conversation


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        # This clock ends the process wherever it is: no Python code is needed for that.
        signal.setitimer(signal.ITIMER_PROF, DEADLINE)
        reply = render(render_jinja_template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(reply)


def render(render_jinja_template, request: dict[str, Any]) -> tuple[str, str]:
    """(name of the error or nothing, text of the error or of the conversation).

    request: template; messages; tools; variables, of the template, special tokens and
    add_generation_prompt included; clock, what the template takes for now, in ISO form.
    """
    random.seed(0)  # for the filter `random`: the same text each time
    clock = datetime.datetime.fromisoformat(request["clock"])
    try:
        rendered, _ = render_jinja_template(
            [request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            strftime_now=clock.strftime,
            **request["variables"],
        )
    except Exception as error:
        return type(error).__name__, str(error)[:1000]
    text = rendered[0]
    if len(text) > LONGEST:
        return "MemoryError", f"it made a text of {len(text):,} characters"
    return "", text


if __name__ == "__main__":
    main()
