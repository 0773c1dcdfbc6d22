"""Chat templates: jinja2 in the immutable sandbox, and strangers' templates under limits as well.

A template that comes with a checkpoint is a program by someone else. The sandbox keeps it from
attributes and mutation, not from running for ever or building a string of 10 GB, so every template but
the built-in one is rendered by a worker process with a limit on memory, time and output.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rlhf_jax.core.errors import UserError

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{% else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The built-in template (ChatML). What stands between the generation marks is trained on."""

RENDER_SECONDS = 1.4
MEMORY_BYTES = 1 << 29
OUTPUT_CHARACTERS = 1 << 24


class TemplateError(UserError):
    """A chat template that cannot be rendered, or was stopped at a limit."""


def has_generation_marks(template: str) -> bool:
    """Whether the template itself says which text the assistant wrote."""
    return "endgeneration" in template


def render(template: str, requests: Sequence[Mapping[str, Any]], marks: tuple[str, str]) -> list[str]:
    """Renders `template` once for each set of variables.

    Args:
      template: jinja2 source, in the dialect of Hugging Face chat templates.
      requests: variables of each rendering (`messages`, `add_generation_prompt`, `bos_token`, ...).
      marks: text put where a `{% generation %}` block opens and closes.

    Raises:
      TemplateError: a syntax error, an error raised by the template, or a limit was reached.
    """
    if template == CHATML:
        reply = _render_all(template, requests, marks)
    else:
        reply = _worker_render(template, requests, marks)
    if isinstance(reply, str):
        raise TemplateError(f"the chat template {reply}; mend the template or use the built-in one")
    return reply


def _render_all(
    template: str, requests: Sequence[Mapping[str, Any]], marks: tuple[str, str]
) -> list[str] | str:
    """The renderings, or what is wrong with the template as the end of a sentence."""
    import jinja2

    try:
        compiled = _compile(template)
        texts = [compiled.render({**request, "generation_marks": marks}) for request in requests]
    except jinja2.TemplateSyntaxError as error:
        return f"has a syntax error in line {error.lineno} ({error.message})"
    except jinja2.TemplateError as error:
        return f"refused the conversation ({error.message})"
    except MemoryError:
        return f"needs more than {MEMORY_BYTES >> 20} MiB"
    # A template runs a stranger's expressions: any exception can come out of them.
    except Exception as error:
        return f"failed ({type(error).__name__}: {error})"
    if sum(map(len, texts)) > OUTPUT_CHARACTERS:
        return f"writes more than {OUTPUT_CHARACTERS} characters"
    return texts


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: puts the caller's marks around its body."""

        tags = {"generation"}  # noqa: RUF012 (the name and type that jinja2 asks for)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.ContextReference()
            return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Any) -> str:
            opening, closing = context["generation_marks"]
            return f"{opening}{caller()}{closing}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        # jinja2's own filter escapes <, > and & for HTML, which no chat template wants.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    return environment.from_string(template)


# The worker -----------------------------------------------------------------------------------------

_START_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from rlhf_jax.data.templates import serve; serve()"
)


def serve() -> None:
    """The worker's loop: reads requests from standard input, answers on standard output."""
    import resource

    import jinja2.sandbox  # noqa: F401 (loaded before memory is limited and before the clock runs)

    # Ctrl-C reaches the whole process group; it is for the parent to say what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, replies = Connection(0, writable=False), Connection(os.dup(1), readable=False)
    replies.send_bytes(b"ready")
    while True:
        try:
            template, variables, marks = json.loads(requests.recv_bytes())
        except EOFError:
            return
        replies.send_bytes(json.dumps(_render_all(template, variables, marks)).encode())


class _Worker:
    """One process that renders. It ends with its parent, whose death closes its input."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START_WORKER, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self.replies = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.replies.recv_bytes()
        except EOFError:
            self.stop()
            raise TemplateError(
                "the process that renders chat templates did not start; check that "
                f"{sys.executable} can import jinja2"
            ) from None

    def render(self, message: bytes) -> list[str] | str:
        self.requests.send_bytes(message)
        if not self.replies.poll(RENDER_SECONDS):
            raise TimeoutError
        return json.loads(self.replies.recv_bytes())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.replies.close()


_worker: _Worker | None = None
_lock = threading.Lock()


def _worker_render(
    template: str, requests: Sequence[Mapping[str, Any]], marks: tuple[str, str]
) -> list[str] | str:
    global _worker
    try:
        message = json.dumps([template, list(requests), marks]).encode()
    except (TypeError, ValueError) as error:
        return f"was given a conversation that is not plain JSON ({error})"
    with _lock:
        if _worker is None or _worker.owner != os.getpid():  # a fork must not share its parent's pipes
            _worker = _Worker()
        try:
            return _worker.render(message)
        except TimeoutError:
            reply = f"ran for more than {RENDER_SECONDS} s"
        except (EOFError, OSError):
            reply = f"broke the process that renders it (more than {MEMORY_BYTES >> 20} MiB)"
        _worker.stop()
        _worker = None
        return reply


@atexit.register
def _stop_worker() -> None:
    if _worker is not None and _worker.owner == os.getpid():
        _worker.stop()
