"""The files of a Hugging Face folder: config.json, safetensors, index. Errors name the file."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from rlhf_jax.core import files as stores
from rlhf_jax.core.errors import UserError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
NUMPY_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Checkpoint:
    """The tensors of a folder; nothing but their headers is read before they are asked for.

    Args:
      folder: holds model.safetensors, or the files that model.safetensors.index.json names.

    Raises:
      UserError: a file is missing, malformed or truncated, or two files hold a tensor of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in self._paths():
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if name in self._files:
                        raise UserError(f"{path}: tensor `{name}` is also in {self._files[name].name}.")
                    self._files[name] = path
        self._check_index()

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def where(self, name: str) -> str:
        """The file that holds a tensor; the folder for one that none does."""
        return str(self._files.get(name, self.folder))

    def dtype(self, name: str) -> str:
        """A floating tensor's dtype.

        Raises:
          UserError: it is not floating.
        """
        with opened(self._files[name]) as file:
            return self._dtype(file, name)

    def read(self, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These tensors, one at a time and file by file.

        Raises:
          UserError: a tensor is not floating, or the file was damaged since.
        """
        for path in dict.fromkeys(self._files.values()):
            wanted = [name for name, file in self._files.items() if file == path and name in names]
            with opened(path) as file:
                for name in wanted:
                    self._dtype(file, name)
                    yield name, file.get_tensor(name)

    def _dtype(self, file: Any, name: str) -> str:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in FLOATS:
            raise UserError(
                f"{self.where(name)}: tensor `{name}` is {dtype}, not one of {', '.join(FLOATS)}: "
                "choose a checkpoint that is not quantised."
            )
        return NUMPY_NAMES[dtype]

    def _paths(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            names = sorted(set(self._index().values()))
            paths = [self.folder / name for name in names]
            for name, path in zip(names, paths, strict=True):
                if Path(name).name != name or not stores.is_file(path):
                    raise UserError(f"{path}: no such file, though {INDEX} names it: download it again.")
            return paths
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        raise UserError(
            f"{self.folder}: no {WEIGHTS} and no {INDEX}: give a folder with safetensors "
            "(`save_pretrained` of a recent transformers writes them)."
        )

    def _index(self) -> dict[str, str]:
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(
                f"{self.folder / INDEX}: `weight_map` is no object of file names: download it again."
            )
        return index

    def _check_index(self) -> None:
        if not (self.folder / INDEX).is_file():
            return
        for name, file in self._index().items():
            if self._files.get(name) != self.folder / file:
                raise UserError(f"{self.folder / file}: holds no tensor `{name}`, though {INDEX} says so.")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}): copy or download it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        data = json.loads(stores.read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give a Hugging Face model folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): copy or download it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object: copy or download it again.")
    return data


class Writer:
    """Writes tensors to a folder, in files of at most `shard_bytes` where one tensor is not larger.

    Everything is written beside what is there and takes its place at the end, so that a failure leaves
    an older checkpoint in the folder as it was.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._size = 0
        self._shards: list[tuple[Path, list[str]]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes one tensor."""
        if self._pending and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor)
        self._size += tensor.nbytes

    def finish(self, config: Mapping[str, Any], *, total_size: int) -> None:
        """Puts everything in its place, config.json last."""
        self._flush()
        stale = [*self._folder.glob("model*.safetensors"), self._folder / INDEX]
        count = len(self._shards)
        names = (
            [WEIGHTS]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for path in stale:
            path.unlink(missing_ok=True)
        for (path, _), name in zip(self._shards, names, strict=True):
            path.replace(self._folder / name)
        if count > 1:
            weight_map = {t: name for (_, held), name in zip(self._shards, names, strict=True) for t in held}
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            self._write_json(INDEX, index)
        self._write_json(CONFIG, config)

    def discard(self) -> None:
        """Removes what was written so far."""
        for path in self._folder.glob(".writing-*.safetensors"):
            path.unlink(missing_ok=True)

    def _flush(self) -> None:
        path = self._folder / f".writing-{len(self._shards)}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending, self._size = {}, 0

    def _write_json(self, name: str, data: Mapping[str, Any]) -> None:
        stores.write_whole(self._folder / name, json.dumps(data, indent=2) + "\n")
