"""Any decoder as a `Policy`: Flax Linen, Flax NNX, or a plain function, with or without its own cache."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.core import Tracer

from rlhf_jax.core.arguments import checked, told
from rlhf_jax.core.errors import UserError, error_place, error_summary
from rlhf_jax.core.protocols import DecodeFn, ExtendFn, HiddenFn, LogitsFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Params
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.from_logits import (
    distribution_from_logits_fn,
    greedy_match_from_logits_fn,
    logprobs_from_logits_fn,
)
from rlhf_jax.models.policy import Policy

Axes = tuple[str | None, ...]


@checked
def wrap(
    apply_fn: Any,
    params: Params,
    tokenizer: Tokenizer,
    *,
    hidden_fn: Callable[..., Array] | str | None = None,
    prefill: PrefillFn | None = None,
    decode: DecodeFn | None = None,
    extend: ExtendFn | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> Policy:
    """A `Policy` of a causal decoder that is not ours.

    `apply_fn` takes `(params, tokens, positions, segment_ids)`, [B, T] each, and returns logits [B, T, V]:
    tokens see those of their own segment that are not behind them, and segment 0 is padding
    (`core.protocols`). Or it takes `(params, tokens)` alone and knows neither padding nor segments: rows are
    then moved so that they begin in column 0, and padding stands behind them, where a causal model does not
    look. Such rows hold one sample each: packed rows are refused.

    Args:
      apply_fn: a function; or a `flax.nnx.Module` or `flax.linen.Module` whose call takes the same without
        `params`. It is called as for inference: set dropout and the like off before.
      params: nested dictionaries of arrays; of a Linen module, its variables, of which the collection
        `params` is trained; of an NNX module None: they are taken out of it.
      hidden_fn: `(params, tokens, positions, segment_ids) -> [B, T, D]`, or with the first two arguments;
        or the name of the module's method for it. PPO and reward models need it.
      prefill: the model's own way into its cache; without one, every new token reads its row again.
      decode: the same; both or none.
      extend: the same, for continuous batching and speculative decoding; only with the other two.
      axes: logical sharding axes (`core.axes.RULES`) of parameters by the end of their names, such as
        {"attention/kernel": ("embed", "heads")}; others are whole on every device
        (`distributed.describe_shardings` says which).

    Raises:
      UserError: the arguments do not fit together, or the result is not [B, T, V].
    """
    if (prefill is None) != (decode is None) or (prefill is None and extend is not None):
        raise UserError("prefill and decode go together, and extend with them: give both or none")
    make, params = _functional(apply_fn, params)
    rows, is_plain = _on_rows(make(None))
    logits_fn = _float_logits(rows)
    hidden, width = None, None
    if hidden_fn is not None:
        hidden = _on_rows(make(hidden_fn) if isinstance(hidden_fn, str) else hidden_fn)[0]
        width = _checked(hidden, params, "hidden_fn", "D")
    vocabulary = _checked(logits_fn, params, "apply_fn", "V")
    if vocabulary < tokenizer.vocab_size:
        raise UserError(
            f"apply_fn gives {vocabulary} logits a token, but the tokenizer has {tokenizer.vocab_size} ids: "
            "give the tokenizer of this model"
        )
    if prefill is None or decode is None:
        prefill, decode, extend = uncached_decode_fns(logits_fn)
    dtype = _float_dtype(params)
    return Policy(
        params=params,
        tokenizer=tokenizer,
        logits_fn=logits_fn,
        make_logprob_fn=functools.partial(logprobs_from_logits_fn, logits_fn),
        make_greedy_match_fn=functools.partial(greedy_match_from_logits_fn, logits_fn),
        make_distribution_fn=functools.partial(distribution_from_logits_fn, logits_fn),
        prefill=prefill,
        decode=decode,
        extend=extend,
        hidden_fn=hidden,
        num_features=width,
        compute_dtype=dtype,
        param_dtype=dtype,
        axes=tuple((axes or {}).items()),
        takes_packed_rows=not is_plain,
    )


def _float_dtype(params: Params) -> str:
    leaves = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return str(leaves[0]) if leaves else "float32"


def _checked(function: Callable[..., Array], params: Params, name: str, last: str) -> int:
    """The last dimension of what a function gives for one row of two tokens."""
    two = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    try:
        shape = getattr(jax.eval_shape(function, params, two, two, two), "shape", None)
    except UserError:
        raise
    except Exception as error:  # of the user's own code
        raise UserError(
            f"{name} raised {error_summary(error)}{error_place(error)} for tokens of shape (1, 2): mend it"
        ) from error
    if shape is None or len(shape) != 3 or shape[:2] != (1, 2):
        raise UserError(f"{name} gives {shape} for tokens of shape (1, 2): it must give [B, T, {last}]")
    return shape[2]


# Functions of parameters -----------------------------------------------------------------------------


def _functional(model: Any, params: Params) -> tuple[Callable[[str | None], Callable[..., Any]], Params]:
    """(method name or None -> function of parameters and inputs, parameters)."""
    if isinstance(model, nnx.Module):
        if params is not None:
            raise UserError("an NNX module brings its own parameters: give None for params")
        return _from_nnx(model)
    if isinstance(model, linen.Module):
        return _from_linen(model, params)

    if not callable(model) or isinstance(model, type):
        raise UserError(f"apply_fn is {told(model)}: give a function, or a module of Flax that was made")

    def named(method: str | None) -> Callable[..., Any]:
        if method is not None:
            raise UserError(f"hidden_fn={method!r}: a function has no methods: give a function")
        return model

    return named, params


def _from_linen(
    module: linen.Module, variables: Mapping[str, Any]
) -> tuple[Callable[[str | None], Callable[..., Any]], Params]:
    if "params" not in variables:
        raise UserError("params of a Linen module are its variables, as init gives them: {'params': ...}")
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def named(method: str | None) -> Callable[..., Any]:
        called = getattr(module, method or "__call__")

        def apply(params: Params, *inputs: Array) -> Any:
            return module.apply({**rest, "params": params}, *inputs, method=method)

        return _with_signature_of(called, apply)

    return named, variables["params"]


def _from_nnx(module: nnx.Module) -> tuple[Callable[[str | None], Callable[..., Any]], Params]:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    pure = nnx.to_pure_dict(state)

    def named(method: str | None) -> Callable[..., Any]:
        called = getattr(module, method or "__call__")

        def apply(params: Params, *inputs: Array) -> Any:
            held = jax.tree.map(lambda leaf: leaf, state)  # a copy, whose leaves are replaced
            nnx.replace_by_pure_dict(held, _keyed_as(pure, params))
            merged = nnx.merge(graph, held, rest)
            return getattr(merged, method or "__call__")(*inputs)

        return _with_signature_of(called, apply)

    return named, _with_text_keys(pure)


def _with_text_keys(tree: Any) -> Any:
    """Lists of layers are dictionaries by number in NNX; names of parameters are texts."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_text_keys(child) for key, child in tree.items()}


def _keyed_as(like: Any, tree: Any) -> Any:
    if not isinstance(like, dict):
        return tree
    return {key: _keyed_as(child, tree[str(key)]) for key, child in like.items()}


def _with_signature_of(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the signature of a bound method, `params` in front."""
    first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
    others = list(inspect.signature(method).parameters.values())
    function.__signature__ = inspect.Signature([first, *others])  # pyright: ignore[reportFunctionMemberAccess]
    return function


# Rows ------------------------------------------------------------------------------------------------


def _on_rows(function: Callable[..., Any]) -> tuple[HiddenFn, bool]:
    """(the function on rows with padding, whether it takes tokens alone)."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
        return function, False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= 4 and (
        positional[3].default is inspect.Parameter.empty or positional[3].name == "segment_ids"
    ):
        return function, False
    required = [p for p in positional if p.default is inspect.Parameter.empty]
    if len(positional) < 2 or len(required) > 2:
        names = ", ".join(p.name for p in positional)
        raise UserError(
            f"apply_fn takes ({names}): it must take (params, tokens, positions, segment_ids) or "
            "(params, tokens), a module the same without params"
        )
    return _plain_rows(function), True


def _plain_rows(function: Callable[..., Array]) -> HiddenFn:
    """A function of tokens alone on rows with padding on either side."""

    def apply(
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Array:
        del positions
        packed = segment_ids > 1
        if not isinstance(packed, Tracer) and np.any(packed):
            raise UserError("the model takes one sample a row, and rows are packed: pad them instead")
        width = tokens.shape[1]
        before = jnp.argmax(segment_ids > 0, axis=1)[:, None]
        columns = jnp.arange(width)
        moved = jnp.take_along_axis(tokens, (columns + before) % width, axis=1)
        outputs = function(params, moved)
        outputs = jax.vmap(lambda row, places: row[places])(outputs, (columns - before) % width)
        # Inside a program nothing can be refused; no number comes out that could be mistaken for a result.
        refused = jnp.any(packed, axis=1).reshape(-1, *(1,) * (outputs.ndim - 1))
        return jnp.where(refused, jnp.nan, outputs)

    return apply


def _float_logits(function: HiddenFn) -> LogitsFn:
    def logits(params: Params, *inputs: Array) -> Float[Array, "B T V"]:
        outputs = function(params, *inputs)
        return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))

    return logits


# Sampling without a cache ----------------------------------------------------------------------------


@pytree_dataclass
class ReadRows:
    """The cache of a model that has none: what was read.

    Attributes:
      tokens: with room for what comes.
      positions: of the tokens.
      segment_ids: 0 where nothing was read.
      length: columns read by prefill and decode.
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]


def uncached_decode_fns(logits_fn: LogitsFn) -> tuple[PrefillFn, DecodeFn, ExtendFn]:
    """(prefill, decode, extend) of a causal model of whole rows, which are read again for every token."""

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "B V"], ReadRows]:
        logits = logits_fn(params, tokens, positions, segment_ids)[:, -1]
        room = ((0, 0), (0, length - tokens.shape[1]))
        rows = [jnp.pad(jnp.asarray(x), room) for x in (tokens, positions, segment_ids)]
        read, places, segments = rows
        return logits, ReadRows(read, places, segments, jnp.int32(tokens.shape[1]))

    def extend(
        params: Params,
        cache: ReadRows,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], ReadRows]:
        places = columns[:, None] + jnp.arange(tokens.shape[1])
        rows = jnp.arange(tokens.shape[0])[:, None]

        def written(held: Array, new: Array | int) -> Array:
            return held.at[rows, places].set(jnp.asarray(new, held.dtype), mode="drop")

        all_tokens = written(cache.tokens, tokens)
        all_positions = written(cache.positions, positions)
        segments = written(cache.segment_ids, 1)
        logits = logits_fn(params, all_tokens, all_positions, segments)
        last = jnp.minimum(places, logits.shape[1] - 1)
        read = ReadRows(all_tokens, all_positions, segments, cache.length)
        return jnp.take_along_axis(logits, last[..., None], axis=1), read

    def decode(
        params: Params, cache: ReadRows, token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], ReadRows]:
        columns = jnp.full(token.shape, cache.length)
        logits, rows = extend(params, cache, token[:, None], position[:, None], columns)
        return logits[:, 0], dataclasses.replace(rows, length=cache.length + 1)

    return prefill, decode, extend
