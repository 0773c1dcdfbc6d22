"""Leaves of a state to and from Orbax: every leaf under its `a/b/0` name in one flat dictionary.

The flat dictionary makes the stored form independent of the classes that make up a state; shapes and
dtypes are checked against the manifest, so a leaf is never padded, cut or cast.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.checkpoint.manifest import Leaf
from rlhf_jax.core.trees import named_leaves

_SCALARS = (bool, int, float, complex)


def describe(tree: Any) -> dict[str, Leaf]:
    """Shape and dtype of every leaf by name.

    Raises:
      TypeError: a leaf is not a numerical array, a scalar or a typed key.
      ValueError: two leaves have the same name.
    """
    leaves = named_leaves(tree)
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise ValueError(
            "two leaves of the state have the same `a/b` name: rename a dictionary key that holds a `/`"
        )
    return {name: _describe_leaf(name, leaf) for name, leaf in leaves.items()}


def _describe_leaf(name: str, leaf: Any) -> Leaf:
    array = np.asarray(leaf) if isinstance(leaf, _SCALARS) else leaf
    dtype = getattr(array, "dtype", None)
    if dtype is None or not (_is_key(array) or _is_number(np.dtype(dtype))):
        raise TypeError(f"leaf `{name}` ({type(leaf).__name__}) is not an array, a scalar or a key")
    return Leaf(tuple(array.shape), str(dtype))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _is_number(dtype: np.dtype) -> bool:
    # longdouble ("g", "G") and swapped bytes have no portable form on disk.
    return (
        jnp.issubdtype(dtype, jnp.number) | (dtype == np.bool_) and dtype.isnative and dtype.char not in "gG"
    )


def to_storage(tree: Any) -> dict[str, Any]:
    """Leaves by name as Orbax stores them: keys as their data, empty arrays not at all.

    NumPy arrays are copied, for their owner may write to them while a save is under way.
    """
    stored = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in named_leaves(tree).items()}
    stored = {name: x if isinstance(x, jax.Array) else np.array(x) for name, x in stored.items()}
    return {name: x for name, x in stored.items() if x.size > 0}


def start_writing(path: Path, stored: dict[str, Any], *, shared: bool = True) -> ocp.AsyncCheckpointer | None:
    """Copies arrays off the devices and starts to write them; `close()` of the result waits and raises.

    A checkpointer serves one save: one that has failed leaves nothing behind for the next.

    Args:
      path: the folder of the files, in which they are written at once: whether they are whole is for the
        manifest to say.
      shared: all processes see one `path`; else each writes to its own, and what they have written makes up
        the checkpoint when it is laid into one folder.
    """
    if not stored:
        return None
    # Without a common disk every process makes its own folder, with a file for each of its shards.
    options = ocp.options.MultiprocessingOptions(primary_host=0 if shared else None)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=shared, multiprocessing_options=options)
    in_place = ocp.path.atomicity.CommitFileTemporaryPath
    checkpointer = ocp.AsyncCheckpointer(
        handler, multiprocessing_options=options, temporary_path_class=in_place
    )
    checkpointer.save(path, args=ocp.args.PyTreeSave(stored))
    return checkpointer


def read_arrays(path: Path, like: dict[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Reads the leaves named in `like` and places each as its example is placed.

    Args:
      like: name -> array, `jax.ShapeDtypeStruct` or scalar whose shape and dtype are those stored.
      prefix: stands before each name in the checkpoint.
    """
    stored = {prefix + name: leaf for name, leaf in like.items() if np.prod(leaf_shape(leaf), dtype=int) > 0}
    raw: dict[str, Any] = {}
    if stored:
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(stored, 0),
            restore_args={name: _restore_arguments(leaf) for name, leaf in stored.items()},
            partial_restore=True,
        )
        raw = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path, args=arguments)
    return {name: _place(name, leaf, raw.get(prefix + name)) for name, leaf in like.items()}


def leaf_shape(leaf: Any) -> tuple[int, ...]:
    """Shape of an array or of a Python scalar."""
    return tuple(getattr(leaf, "shape", ()))


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a restored leaf must live; None where its example is on the host or is not committed."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    if sharding is None or _is_key(leaf) or getattr(leaf, "weak_type", False):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _place(name: str, like: Any, value: Any) -> Any:
    """Gives a stored value the kind (Python, NumPy, JAX, key), device and weak type of its example."""
    if isinstance(like, _SCALARS):
        return type(like)(value.item())
    if value is None:
        empty = _key_data(like)[1] if _is_key(like) else like
        value = np.zeros(empty.shape, empty.dtype)
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    if not isinstance(value, jax.Array):
        if getattr(like, "weak_type", False) and like.shape == ():
            value = value.item()  # weak again: a resume must promote, and compile, as the unbroken run does
        sharding = _sharding(like)
        value = jnp.array(value) if sharding is None else jax.device_put(value, sharding)
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=_key_data(like)[0])
    if value.dtype != like.dtype:
        raise TypeError(
            f"leaf `{name}` is {like.dtype}, which JAX holds as {value.dtype}: set jax_enable_x64"
        )
    return value


def _key_data(like: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Implementation and data of a key; traced, for a `ShapeDtypeStruct` alone does not give them."""
    implementations = []

    def data(key: jax.Array) -> jax.Array:
        implementations.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    shape = jax.eval_shape(data, like)
    return implementations[0], shape
