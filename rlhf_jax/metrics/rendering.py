"""Templates of the package's HTML pages: one self-contained file each, escaped, with one script of our own.

Texts of models are untrusted. Templates escape everything; the page's content security policy forbids the
network, and every script but the one whose hash it names.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

_NAMES = ("base.html.jinja", "report.html.jinja", "comparison.html.jinja")


def render(name: str, view: Mapping[str, Any], *, refresh: int = 0) -> bytes:
    """A page.

    Args:
      name: of the template.
      view: what it shows, as plain values.
      refresh: seconds after which a browser loads it again; 0 for never.
    """
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    html = (
        _environment().get_template(name).render(**view, script=script, script_hash=digest, refresh=refresh)
    )
    # JSON may hold lone surrogates, which UTF-8 cannot.
    return html.encode("utf-8", errors="backslashreplace")


@functools.cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.DictLoader({name: _read(name) for name in _NAMES}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read(name: str) -> str:
    return (resources.files("rlhf_jax.metrics") / name).read_text(encoding="utf-8")
