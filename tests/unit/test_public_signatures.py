"""Above `models/` a model is a `Policy`, or plain callables: nothing there takes our description of one."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

import rlhf_jax

ALLOWED = (
    "rlhf_jax.models",
    "rlhf_jax.planning.steps",
    "rlhf_jax.planning.analytic",
    "rlhf_jax.stages.inspect",  # a command about architectures
)


def modules():
    names = [m.name for m in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax.")]
    return [name for name in names if not name.startswith(ALLOWED) and not name.endswith("_worker")]


def annotations_of(thing):
    """Texts of what a public function takes, or of the fields and methods of a public class."""
    if inspect.isclass(thing):
        fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
        yield from (str(field.type) for field in fields)
        for name, method in inspect.getmembers(thing, inspect.isfunction):
            if not name.startswith("_") or name == "__init__":
                yield from annotations_of(method)
    elif inspect.isfunction(thing):
        yield from (str(hint) for name, hint in thing.__annotations__.items() if name != "return")


@pytest.mark.parametrize("name", modules())
def test_no_public_name_takes_a_model_config(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"an extra is not installed: {error}")
    for public, thing in vars(module).items():
        if public.startswith("_") or getattr(thing, "__module__", None) != name:
            continue
        taken = [text for text in annotations_of(thing) if "ModelConfig" in text]
        assert not taken, f"{name}.{public} takes {taken}"
