"""Published checkpoints, wherever they are: a Hugging Face folder, a GGUF file, a model known by name.

What training needs is the default: parameters in float32 whatever the files hold, computation in bfloat16
where the hardware has it, deep models with stacked layers.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import nearest_name
from rlhf_jax.core.types import Params
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.config import AttentionBackend, ModelConfig, Remat
from rlhf_jax.models.gguf import GgufFile, whole_gguf
from rlhf_jax.models.gguf_tokenizer import tokenizer_of
from rlhf_jax.models.hf.reading import read_params
from rlhf_jax.models.mtp import param_shapes
from rlhf_jax.models.named import NAMED_MODELS, find_in_package
from rlhf_jax.models.reconfiguring import check_dtype, default_dtype, scans_by_default

CheckpointKind = Literal["run", "hf", "gguf", "package", "hub"]
"""A run folder (`training.runs`), a Hugging Face folder, a GGUF file, a name of `named.NAMED_MODELS`, or a
name in the local hub cache."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def kind_of_checkpoint(path: str | os.PathLike[str]) -> CheckpointKind:
    """Kind of checkpoint that a path or name refers to; what is on disk wins over a name.

    Raises:
      UserError: nothing is there, and it is no name; or a folder that holds no model.
    """
    place = files.as_local(path, "published models are read")
    if files.is_file(place / "model.json"):
        return "run"
    if files.is_file(place / "config.json"):
        return "hf"
    if files.is_file(place):
        with place.open("rb") as file:
            if file.read(4) == b"GGUF":
                return "gguf"
        raise UserError(f"{place}: not a GGUF file: give one, a Hugging Face folder or a run folder.")
    if files.is_folder(place):
        raise UserError(
            f"{place}: neither a run folder (model.json) nor a Hugging Face folder (config.json): give the "
            "folder that holds one of these files."
        )
    if os.fspath(path) in NAMED_MODELS:
        return "package"
    if HUB_NAME.fullmatch(os.fspath(path)) and not (place.parent.name and files.is_folder(place.parent)):
        return "hub"
    beside = [sibling.name for sibling in place.parent.iterdir()] if files.is_folder(place.parent) else []
    raise UserError(
        f"{os.fspath(path)}: no such file or folder{nearest_name(place.name, beside)}: give a run, a Hugging "
        "Face folder or a GGUF file."
    )


def find_in_hub_cache(name: str, *, revision: str = "main") -> Path:
    """The folder of a model that was downloaded before, by its name such as `org/model`.

    Looked for in $HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub. Nothing is downloaded.

    Raises:
      UserError: it is not there.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    model = cache / f"models--{name.replace('/', '--')}"
    reference = model / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if files.is_file(reference) else revision
    folder = model / "snapshots" / commit
    if not files.is_file(folder / "config.json"):
        raise UserError(
            f"{name}: no such file or folder, and no model of this name in the hub cache {cache}: download "
            f"it with `huggingface-cli download {name}`."
        )
    return folder


def local_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file or folder that a path or name refers to.

    Raises:
      UserError: there is none.
    """
    finders = {"package": find_in_package, "hub": find_in_hub_cache}
    find = finders.get(kind_of_checkpoint(path))
    return find(os.fspath(path)) if find else files.as_local(path, "published models are read")


def load_architecture(path: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of a published model, of which nothing but its description is read.

    Raises:
      UserError: as `load_checkpoint`.
    """
    place = local_checkpoint(path)
    if kind_of_checkpoint(place) != "gguf":
        return hf.load_config(place)
    with whole_gguf(place):
        return GgufFile(place).config()


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: Remat | None = None,
    scan_layers: bool | None = None,
    attention_backend: AttentionBackend | None = None,
    mesh: Mesh | None = None,
    shapes_only: bool = False,
) -> tuple[ModelConfig, Params, Tokenizer]:
    """A published model: architecture, parameters and tokenizer.

    Args:
      path: a Hugging Face folder, a GGUF file, a name of `named.NAMED_MODELS`, or a name in the local hub
        cache. A run folder is not read here but by `training.runs.load_policy`.
      dtype: of computation; bfloat16 on GPUs and TPUs and float32 on CPUs by default.
      param_dtype: of parameters; float32 by default, so that small updates move them. A frozen base may do
        with bfloat16.
      remat: what the backward pass computes again; nothing by default.
      scan_layers: whether layers are stacked and run as one scan; by default where there are more than 8 and
        their pattern repeats.
      attention_backend: how attention is computed (`ModelConfig`); `auto` by default.
      mesh: every parameter goes to where `distributed.tree_shardings` puts it.
      shapes_only: parameters are `jax.ShapeDtypeStruct`s, and no weight is read.

    Raises:
      UserError: there is no such model, it is not supported, or a file is damaged.
    """
    check_dtype("dtype", dtype)
    check_dtype("param_dtype", param_dtype)

    def planned(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config,
            compute_dtype=dtype or default_dtype(),
            param_dtype=param_dtype or "float32",
            remat=remat or config.remat,
            scan_layers=scans_by_default(config) if scan_layers is None else scan_layers,
            attention_backend=attention_backend or config.attention_backend,
        )

    place = local_checkpoint(path)
    kind = kind_of_checkpoint(place)
    if kind == "run":
        raise UserError(f"{path}: a run folder, no published model: load it by `training.runs.load_policy`.")
    if kind == "gguf":
        with whole_gguf(place):
            file = GgufFile(place)
            config = planned(file.config())
            params = (
                param_shapes(config) if shapes_only else read_params(file.family, config, file, mesh=mesh)
            )
            return config, params, _gguf_tokenizer(file)
    config = planned(hf.load_config(place))
    if shapes_only:
        return config, param_shapes(config), load_tokenizer(place)
    _, params = hf.load(place, dtype=config.param_dtype, mesh=mesh, scan_layers=config.scan_layers)
    return config, params, load_tokenizer(place)


def _gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Tokenizer of the GGUF file; a tokenizer.json beside it wins."""
    beside = file.folder.with_name("tokenizer.json")
    if beside.is_file():
        return load_tokenizer(beside)
    return tokenizer_of(file.tokenizer_metadata(), str(file.folder))
