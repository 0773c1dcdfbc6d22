"""Chat templates: jinja2 in the immutable sandbox, and strangers' templates under limits as well.

A template that comes with a checkpoint is a program by someone else. The sandbox keeps it from
attributes and mutation, not from running for ever or building a string of 10 GB, so every template but
the built-in one is rendered by a process with limits on memory, time and output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.sandbox.workers import LimitedWorker

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
REPLY_BYTES = 1 << 28  # more than the characters that a template may write can take in JSON


class TemplateError(UserError):
    """A chat template that cannot be rendered, or was stopped at a limit."""


def has_generation_marks(template: str) -> bool:
    """True if the template itself says which text the assistant wrote."""
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
    task = [template, list(requests), marks]
    if template == CHATML:
        from rlhf_jax.data import template_worker  # loads jinja2

        reply = template_worker.render_all(task)
    else:
        reply = _render_under_limits(task)
    if isinstance(reply, str):
        raise TemplateError(f"the chat template {reply}; mend the template or use the built-in one")
    return reply


_worker = LimitedWorker(
    "rlhf_jax.data.template_worker:render_all",
    seconds=RENDER_SECONDS,
    memory_bytes=MEMORY_BYTES,
    reply_bytes=REPLY_BYTES,
)


def _render_under_limits(task: list[Any]) -> list[str] | str:
    outcome = _worker.run([task])[0]
    match outcome.status:
        case "done":
            return outcome.value
        case "memory":
            return f"needs more than {MEMORY_BYTES >> 20} MiB"
        case "killed":
            return f"broke the process that renders it, which {outcome.message}"
        case "timeout" | "crashed":
            return outcome.message
