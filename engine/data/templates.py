"""Chat templates: from messages to text, in a process that can be killed, with a clock that stands.

The text is that of the tokenizer's `apply_chat_template`. What a template does wrong is a
TemplateFailure with its words, whether it raises an error, does not end, or fills the memory.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Pipe
from typing import Any

from tandem.engine.data.template_worker import DEADLINE


class TemplateFailure(ValueError):
    """A chat template raised an error, did not end, or took too much memory."""


class Template:
    """The chat template of a tokenizer, with the variables that the config gives it.

    clock: the ISO date or time that `strftime_now` of a template tells.
    """

    def __init__(self, tokenizer, variables: Mapping[str, Any], clock: str | None):
        self.tokenizer = tokenizer
        self.variables = dict(variables)
        self.clock = clock or date.today().isoformat()

    @property
    def source(self) -> str:
        """The template's text; of several, all. Empty if there is none."""
        template = self.tokenizer.chat_template or ""
        if isinstance(template, dict):
            return "\n".join(template.values())
        return template

    def render(self, messages: Sequence[dict], tools: list | None, generation: bool) -> str:
        """The text of a conversation. generation: the header of the assistant's turn follows it.

        Raises TemplateFailure.
        """
        from transformers import PreTrainedTokenizerBase

        variables = {**self.variables, "add_generation_prompt": generation}
        own = type(self.tokenizer).apply_chat_template
        # Python code of the tokenizer
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            try:
                return self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, **variables
                )
            except Exception as error:
                raise TemplateFailure(f"{type(error).__name__}: {error}") from None
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, none of them for this
            raise TemplateFailure(str(error)) from None
        variables = {**self.tokenizer.special_tokens_map, **variables}
        error, text = WORKER.ask(
            {
                "template": template,
                "messages": list(messages),
                "tools": tools,
                "variables": variables,
                "clock": self.clock,
            }
        )
        if error:
            raise TemplateFailure(f"{error}: {text}")
        return text


@dataclass
class Renderer:
    """A process that renders."""

    process: subprocess.Popen
    connection: Any  # of multiprocessing; its type depends on the system
    owner: int  # the process that started it: a fork of that must not end it
    ready: bool = False


class Worker:
    """The process that renders, started when first needed and again after it was killed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.renderer: Renderer | None = None

    def ask(self, request: dict[str, Any]) -> tuple[str, str]:
        """The reply (see engine/data/template_worker.py).

        Raises TemplateFailure if the process dies of it.
        """
        with self.lock:
            renderer = self.renderer
            if renderer is None or renderer.owner != os.getpid():
                renderer = self.renderer = start_renderer()
            try:
                if not renderer.ready:
                    renderer.connection.recv()  # it says so
                    renderer.ready = True
                renderer.connection.send(request)
                return renderer.connection.recv()
            except (EOFError, ConnectionError):
                code = renderer.process.wait()
                self.stop()
                raise TemplateFailure(reason(code)) from None
            except BaseException:  # an answer that nobody waits for must not be the next one's
                self.stop()
                raise

    def stop(self) -> None:
        renderer, self.renderer = self.renderer, None
        if renderer is not None and renderer.owner == os.getpid():
            renderer.process.kill()
            renderer.process.wait()
            renderer.connection.close()


def start_renderer() -> Renderer:
    ours, theirs = Pipe()
    with theirs:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tandem.engine.data.template_worker", str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    return Renderer(process, ours, os.getpid())


def reason(code: int) -> str:
    """Why a worker with this exit code ended."""
    if code == -signal.SIGPROF:
        return f"it did not end within {DEADLINE} s of CPU time"
    return f"the process that renders it died (exit code {code})"


WORKER = Worker()
atexit.register(WORKER.stop)
