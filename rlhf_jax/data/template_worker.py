"""Worker process for chat templates, and the built-in template in ours. It alone loads jinja2."""

import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

OUTPUT_CHARACTERS = 1 << 24


def render_all(task: Sequence[Any]) -> list[str] | str:
    """The renderings of (template, requests, marks), or what is wrong as the end of a sentence."""
    template, requests, marks = task
    try:
        compiled = _compile(template)
        texts = [compiled.render({**request, "generation_marks": marks}) for request in requests]
    except jinja2.TemplateSyntaxError as error:
        return f"has a syntax error in line {error.lineno} ({error.message})"
    except jinja2.TemplateError as error:
        return f"refused the conversation ({error.message})"
    except MemoryError:
        raise
    # A template runs a stranger's expressions: any exception can come out of them.
    except Exception as error:
        return f"failed ({type(error).__name__}: {error})"
    if sum(map(len, texts)) > OUTPUT_CHARACTERS:
        return f"writes more than {OUTPUT_CHARACTERS} characters"
    return texts


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> Any:
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
