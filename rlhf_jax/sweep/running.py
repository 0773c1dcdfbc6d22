"""The sweep itself: one compiled program, run over chunks of seeds x settings, on all devices."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path, PathLike
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.metrics.progress import Progress
from rlhf_jax.sweep.results import Results

TrainFn = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
_DESCRIPTION = "sweep.json"


def sweep(
    train: TrainFn,
    keys: Any,
    hypers: Any,
    *,
    mesh: Mesh | None = None,
    chunk_size: int | None = None,
    folder: PathLike | None = None,
    quiet: bool = False,
) -> Results:
    """Every setting with every seed. Runs do not depend on chunks, devices or their neighbours.

    `vmap` inside, `shard_map` over all devices outside, compiled once for all chunks. Final states stay on
    the devices and are dropped: what is to leave a run must be in its history.

    Args:
      train: (key, hyper) -> (state, history), pure; the history holds scalars and arrays [U].
      keys: [S] typed keys, one a seed; all settings get the same. Or a pytree of arrays [S, ...], where a
        seed is more than a key (a policy to start from): whatever `train` takes first.
      hypers: settings, [H] in every leaf (`product`, `zipped`, `drawn`).
      mesh: devices to use, whatever its axes; None for all there are.
      chunk_size: runs at once, rounded up to a multiple of the devices; None for all of them. Where the
        folder holds chunks that are no larger, their size stays.
      folder: each chunk is kept here when it is done, and a sweep started again goes on after the last,
        also with runs added at its end (more seeds of one setting, or more settings); also gets
        `results.parquet`. None keeps nothing on disk.
      quiet: show no progress.

    Raises:
      UserError: the folder holds another sweep, or cannot be written to.
    """
    folder = None if folder is None else files.as_path(folder)
    mesh = mesh or jax.make_mesh((jax.device_count(),), ("runs",), axis_types=(AxisType.Auto,))
    settings, seeds = (jax.tree.leaves(tree)[0].shape[0] for tree in (hypers, keys))
    runs = settings * seeds
    held = _Store.held(folder).get("chunk_size", runs)
    size = min(chunk_size or held, held, runs)
    size = -(-size // mesh.size) * mesh.size
    chunks = -(-runs // size)
    store = _Store(folder, _describe(train, keys, hypers, size))
    run_chunk = _compile_once(train, mesh, keys, hypers, size)
    parts: list[dict[str, np.ndarray]] = []
    with Progress("sweep", chunks, quiet=quiet) as progress:
        for chunk in range(chunks):
            count = min(size, runs - chunk * size)
            part = store.load(chunk, count)
            if part is None:
                # The last chunk repeats the last run to fill up, so that one program serves all.
                index = np.minimum(np.arange(chunk * size, (chunk + 1) * size), runs - 1)
                part = run_chunk(index // seeds, index % seeds)
                part = {name: values[:count] for name, values in part.items()}
                store.save(chunk, part)
            parts.append(part)
            progress.update(chunk + 1)
    metrics = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {name: values.reshape(settings, seeds, *values.shape[1:]) for name, values in metrics.items()}
    results = Results({name: np.asarray(leaf) for name, leaf in named_leaves(hypers).items()}, metrics)
    if folder is not None:
        results.write(folder / "results.parquet")
    return results


def _compile_once(
    train: TrainFn, mesh: Mesh, keys: Any, hypers: Any, size: int
) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """(setting, seed) of each run of a chunk -> their metrics on the host; compiles at the first call."""
    spec = PartitionSpec(mesh.axis_names)
    sharding = NamedSharding(mesh, spec)

    def histories(keys: Any, hypers: Any) -> dict[str, jax.Array]:
        return jax.vmap(lambda key, hyper: train(key, hyper)[1])(keys, hypers)

    # Each device runs its own share; there is nothing to communicate and nothing for it to wait for.
    on_each = jax.shard_map(histories, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    on_all = jax.jit(on_each, compiler_options=compiler_options())

    def run_chunk(setting: np.ndarray, seed: np.ndarray) -> dict[str, np.ndarray]:
        chosen = (_rows(keys, seed), _rows(hypers, setting))
        history = jax.device_get(on_all(*jax.device_put(chosen, sharding)))
        for name, values in history.items():
            if values.ndim > 2:
                raise UserError(
                    f"sweep: metric {name!r} has shape {values.shape[1:]} in a run: reduce it to a scalar, "
                    "or to one number an update"
                )
        return history

    return run_chunk


def fitting_chunk_size(train: TrainFn, keys: Any, hypers: Any, *, memory_bytes: int) -> int:
    """Largest chunk size that fits into `memory_bytes`, by the compiler's count for two runs and for four.

    At least 1. It compiles twice, which takes as long as two first calls.

    Raises:
      UserError: the backend does not tell.
    """

    def needed(count: int) -> int:
        first = [_rows(tree, np.zeros(count, int)) for tree in (keys, hypers)]
        compiled = jax.jit(jax.vmap(lambda *run: train(*run)[1])).lower(*first).compile()
        analysis = compiled.memory_analysis()
        if analysis is None:
            raise UserError("this backend does not tell how much memory a program needs: give chunk_size")
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes + analysis.argument_size_in_bytes

    two, four = needed(2), needed(4)
    each = max((four - two) // 2, 1)
    return max((memory_bytes - max(two - 2 * each, 0)) // each, 1)


def _describe(train: TrainFn, keys: Any, hypers: Any, size: int) -> dict[str, Any]:
    """Fingerprint of a sweep's chunks: key and setting of each run, and the shapes it returns."""
    one = jax.tree.map(lambda leaf: leaf[0], (keys, hypers))
    history = jax.eval_shape(train, *one)[1]
    shapes = {name: [str(leaf.dtype), *leaf.shape] for name, leaf in sorted(history.items())}
    seeds = _digests({str(index): leaf for index, leaf in enumerate(jax.tree.leaves(keys))})
    runs = [setting + seed for setting in _digests(named_leaves(hypers)) for seed in seeds]
    return {"chunk_size": size, "history": shapes, "runs": runs}


def _digests(leaves: dict[str, Any]) -> list[str]:
    """One for each row of arrays [N, ...], by name."""
    rows = {}
    for name, leaf in leaves.items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        rows[name] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    count = min(len(array) for array in rows.values())
    described = (
        b"".join(name.encode() + array[i].tobytes() for name, array in rows.items()) for i in range(count)
    )
    return [hashlib.sha256(row).hexdigest()[:16] for row in described]


def _rows(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tree)


class _Store:
    """Chunks on disk; nothing where there is no folder."""

    def __init__(self, folder: Path | None, description: dict[str, Any]) -> None:
        self._folder = None if folder is None else folder / "chunks"
        self._names = list(description["history"])
        if self._folder is None:
            return
        held = self.held(folder)
        first = description["runs"][: len(held.get("runs", []))]
        if held and held != {**description, "runs": first}:
            raise UserError(f"{folder} holds another sweep: choose another folder, or remove it")
        files.write_json(self._folder / _DESCRIPTION, description)

    @staticmethod
    def held(folder: Path | None) -> dict[str, Any]:
        """The description of what the folder holds; empty where it holds nothing."""
        if folder is None:
            return {}
        path, keys = folder / "chunks" / _DESCRIPTION, ("chunk_size", "history", "runs")
        if not files.exists(path):
            return {}
        return files.read_json(path, keys=keys, remedy=f"remove {path.parent}, and the sweep is made again")

    def load(self, chunk: int, runs: int) -> dict[str, np.ndarray] | None:
        """A chunk done before; None too where runs were added to it since, or it is damaged."""
        path = self._path(chunk)
        if path is None or not files.exists(path):
            return None
        try:
            part = files.read_arrays(path, keys=self._names, remedy="the chunk is made again")
        except files.DamagedFile as error:
            files.made_again(error)
            return None
        return part if {len(part[name]) for name in self._names} == {runs} else None

    def save(self, chunk: int, part: dict[str, np.ndarray]) -> None:
        """Writes the results of a chunk."""
        path = self._path(chunk)
        if path is not None:
            files.write_arrays(path, part)

    def _path(self, chunk: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{chunk}.npz"
