"""Tensors into parameters: each is checked against the architecture and goes straight to its place."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import map_named, named_leaves
from rlhf_jax.core.types import Params
from rlhf_jax.distributed import tree_shardings
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import init_params
from rlhf_jax.models.hf.mapping import Family, Tensor, packed_shape

Place = tuple[int, ...]
"""Where a piece stands along the first axes of a parameter that stacks several (layers, experts)."""


_HEAD = "lm_head.weight"


@runtime_checkable
class Tensors(Protocol):
    """Named tensors, wherever they are stored, under the names that the family's files have."""

    @property
    def folder(self) -> Path:
        """Folder of the tensors, for messages."""
        ...

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor."""
        ...

    def read(self, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These tensors, one at a time."""
        ...


def read_params(family: Family, config: ModelConfig, tensors: Tensors, *, mesh: Mesh | None = None) -> Params:
    """The parameters of a decoder in the layout and dtype of `config`.

    Raises:
      UserError: a tensor is missing, superfluous, of another shape or dtype, or damaged.
    """
    rules = _rules_by_stored_name(family, config, tensors)
    _check_tied_copy(config, tensors, rules)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    wanted = named_leaves(shapes)
    shardings = named_leaves(tree_shardings(mesh, shapes)) if mesh is not None else {}
    placed: dict[str, jax.Array] = {}
    for name, tensor in tensors.read(set(rules)):
        places = [_place_of(config, param, rules[name].slot) for param in rules[name].params]
        pieces = _unpack(rules[name], tensor, places, wanted, f"{tensors.where(name)}: tensor `{name}`")
        for (param, place), piece in zip(places, pieces, strict=True):
            placed[param] = _put_in(piece, wanted[param], place, placed.get(param), shardings.get(param))
    return map_named(lambda name, _: placed[name], shapes)


def _check_tied_copy(config: ModelConfig, tensors: Tensors, rules: Mapping[str, Tensor]) -> None:
    """Refuses an output matrix of its own where config.json says that it is the embedding."""
    if not config.tie_word_embeddings or _HEAD not in tensors.names():
        return
    embedding = next(name for name, rule in rules.items() if rule.params == ("embedding",))
    held = dict(tensors.read({_HEAD, embedding}))
    if held[_HEAD].shape != held[embedding].shape or (held[_HEAD] != held[embedding]).any():
        raise UserError(
            f"{tensors.where(_HEAD)}: tensor `{_HEAD}` is not the embedding, though config.json says "
            "`tie_word_embeddings`: set that to false to use it, or remove the tensor"
        )


def stored_name(family: Family, config: ModelConfig, tensors: Tensors, param: str) -> str:
    """The name under which a parameter of its own is stored."""
    rules = _rules_by_stored_name(family, config, tensors)
    return next(name for name, rule in rules.items() if rule.params == (param,))


def _place_of(config: ModelConfig, param: str, slot: int | None) -> tuple[str, Place]:
    """The parameter that holds what an unrolled decoder calls `param`, and where in it."""
    inner = () if slot is None else (slot,)
    layer, _, rest = param.partition("/")
    if config.scan_layers and layer.startswith("layer_"):
        return f"layers/{rest}", (int(layer.removeprefix("layer_")), *inner)
    return param, inner


def _rules_by_stored_name(family: Family, config: ModelConfig, tensors: Tensors) -> dict[str, Tensor]:
    """The family's tensors by the name they have in this checkpoint; neither more nor fewer than it holds."""
    rules = {rule.name: rule for rule in family.tensors(config)}
    stored, prefix = tensors.names(), family.optional_prefix
    if not any(name.startswith(prefix) for name in stored):
        rules = {name.removeprefix(prefix): rule for name, rule in rules.items()}
    missing = sorted(rules.keys() - stored)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{tensors.folder}: tensor `{missing[0]}`{others} is in none of the safetensors files, though "
            f"config.json asks for it: download the folder again or mend config.json."
        )
    tied_copy = {_HEAD} if config.tie_word_embeddings else set()
    extra = sorted(n for n in stored - rules.keys() - tied_copy if not family.ignores(n, config))
    if extra:
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{tensors.where(extra[0])}: tensor `{extra[0]}`{others} has no place in the architecture of "
            f"config.json: mend config.json or choose another tensors."
        )
    return rules


def _unpack(
    rule: Tensor,
    tensor: np.ndarray,
    places: list[tuple[str, Place]],
    wanted: Mapping[str, Any],
    where: str,
) -> list[np.ndarray]:
    """The parameters in a tensor, each of the right shape."""
    shapes = [wanted[param].shape[len(place) :] for param, place in places]
    try:
        pieces = list(rule.layout.unpack(tensor))
    except (ValueError, IndexError):
        pieces = []
    if [piece.shape for piece in pieces] != shapes:
        expected = packed_shape(rule, shapes)
        raise UserError(
            f"{where} has shape {list(tensor.shape)}, and config.json asks for {list(expected)}: mend it or "
            "choose another checkpoint."
        )
    return pieces


def _put_in(
    piece: np.ndarray,
    wanted: jax.ShapeDtypeStruct,
    place: Place,
    stack: jax.Array | None,
    sharding: NamedSharding | None,
) -> jax.Array:
    """The parameter on its devices: the piece itself, or `stack` with the piece in its place."""
    if not place:
        return _put(piece, wanted.dtype, sharding)
    if stack is None:
        stack = jnp.zeros(wanted.shape, wanted.dtype, device=sharding)
    of_piece = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(place) :]))
    return _write(stack, _put(piece, wanted.dtype, of_piece), place, sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(stack: jax.Array, piece: jax.Array, place: Place, sharding: NamedSharding | None) -> jax.Array:
    stack = stack.at[place].set(piece)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


def _put(piece: np.ndarray, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(piece).astype(dtype)
    return jax.make_array_from_callback(piece.shape, sharding, lambda index: piece[index].astype(dtype))
