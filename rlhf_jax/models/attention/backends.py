"""softmax(q k^T) v: `choose_backend` says how it is computed, `plain_attention` what it is."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rlhf_jax.core.axes import partition_spec, shards
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.models.attention.blocked import ATTENDED, blocked_attention
from rlhf_jax.models.attention.ring import ring_attention
from rlhf_jax.models.attention.splash import splash_attention, splash_on_one_device
from rlhf_jax.models.attention.ulysses import serves, ulysses_attention
from rlhf_jax.models.config import AttentionBackend

Backend = Literal["plain", "blocked", "cudnn", "splash", "ring", "ulysses"]

ATTENTION_NAMES = ("query", "key", "value", ATTENDED)
"""What the backward pass of attention reads, by the names under which `remat` policies keep it."""


@pytree_dataclass
class AttentionContext:
    """Attention context that every layer of a pass shares: positions and masks.

    Attributes:
      positions: of the tokens read now.
      key_positions: of every column that may be attended to.
      mask: who sees whom, windows apart.
      start: the column of the cache that the first token goes to; of all rows, or of each.
      segment_ids: of the tokens read now, where no column but theirs may be attended to; else None.
      present: which of the tokens read now are not padding.
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    mask: Bool[Array, "B T S"]
    start: Int[Array, "*B"]
    segment_ids: Int[Array, "B T"] | None
    present: Bool[Array, "B T"]

    def distance(self) -> Int[Array, "B T S"]:
        """Distance in tokens from each query back to each column."""
        return self.positions[:, :, None] - self.key_positions[:, None, :]

    def seen(self, window: int | None) -> Bool[Array, "B T S"]:
        """Attention mask, `window` tokens back at most."""
        return self.mask if window is None else self.mask & (self.distance() < window)

    def behind_prompt(self, length: int) -> "AttentionContext":
        """The same with a soft prompt before every sample: at the positions before 0, seen by all."""
        before = ((0, 0), (length, 0))
        positions = jnp.pad(self.key_positions, before).at[:, :length].set(jnp.arange(-length, 0))
        mask = jnp.pad(self.mask, ((0, 0), *before), constant_values=True)
        return dataclasses.replace(self, key_positions=positions, mask=mask)


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K v"],
    context: AttentionContext,
    *,
    backend: AttentionBackend,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B H T S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T H v"]:
    """softmax(softcap(scale q k^T) + bias) v over the columns that each token sees.

    Tokens of segment 0, which are padding, get something finite that depends on the backend.

    Args:
      window: how many tokens are seen, the current one included; None for all before.

    Raises:
      UserError: a backend was asked for that cannot serve this layer here.
    """
    query, key, value = (
        checkpoint_name(heads, name)
        for heads, name in zip((query, key, value), ATTENTION_NAMES, strict=False)
    )
    chosen = choose_backend(
        backend, query, value, context, softcap=softcap, biased=bias is not None, platform=_platform()
    )
    segments, mask = context.segment_ids, context.seen(window)
    if chosen == "plain" or segments is None:
        return plain_attention(query, key, value, mask, scale=scale, softcap=softcap, bias=bias)
    if chosen in ("ring", "ulysses"):
        return context_parallel_attention(
            chosen,
            query,
            key,
            value,
            context.positions,
            segments,
            scale=scale,
            softcap=softcap,
            window=window,
        )
    if chosen == "splash":
        return splash_attention(query, key, value, segments, scale=scale, softcap=softcap, window=window)
    if chosen == "cudnn":
        return cudnn_attention(query, key, value, mask, segments, scale=scale, bias=bias, window=window)
    return blocked_attention(query, key, value, mask, scale=scale, softcap=softcap, bias=bias, window=window)


def choose_backend(
    asked: AttentionBackend,
    query: Float[Array, "B T H d"],
    value: Float[Array, "B S K v"],
    context: AttentionContext,
    *,
    softcap: float | None,
    biased: bool,
    platform: str,
) -> Backend:
    """The one place where it is decided how attention is computed.

    `auto` takes cuDNN on NVIDIA GPUs and splash attention on TPUs where they apply, and blocks where they do
    not and everywhere else, so that no whole square of logits is ever held. Reading from a cache, a token at
    a time, is bound by memory and plain. Where the columns are split over devices, keys and values go around
    in a ring, or heads are exchanged for columns (`ulysses`), which then get what `auto` says. Values in more
    columns than there are queries begin with a soft prompt, which goes through blocks on any devices; a bias
    on split columns is plain, and no more than a device's share of the square.

    Raises:
      UserError: `asked` names a backend that does not apply.
    """
    if context.segment_ids is None:
        return "plain"
    devices, prompted = shards("time", query.shape[1]), value.shape[1] > query.shape[1]
    if devices > 1 and asked in ("auto", "ring", "ulysses"):
        if asked == "auto":
            return "plain" if biased else "blocked" if prompted else "ring"
        obstacle = _prompt_obstacle(prompted) or _split_obstacle(asked, query, value, devices, biased)
        if obstacle:
            raise UserError(f"attention_backend={asked} cannot be used: {obstacle}; choose auto.")
        return asked
    if asked in ("ring", "ulysses"):
        asked = "auto"
    best: dict[str, Backend] = {"gpu": "cudnn", "tpu": "splash"}
    backend = best.get(platform, "blocked") if asked == "auto" else asked
    obstacle = None
    if backend == "cudnn":
        obstacle = _prompt_obstacle(prompted) or _cudnn_obstacle(query, value, softcap, platform)
    elif backend == "splash":
        obstacle = _prompt_obstacle(prompted) or _splash_obstacle(biased, platform)
    if obstacle is None:
        return backend
    if asked == "auto":
        return "blocked"
    raise UserError(f"attention_backend={asked} cannot be used: {obstacle}; choose auto or another one.")


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.default_backend()
    if device is not None and device.platform != here:  # a program is compiled ahead of time
        return "a GPU that is not here" if device.platform == "gpu" else device.platform
    if here == "gpu" and "cuda" not in jax.devices()[0].client.platform_version:
        return "rocm"
    return here


def _prompt_obstacle(prompted: bool) -> str | None:
    """Why a kernel for whole rows cannot serve columns before the first token, if there are any."""
    if prompted:
        return "its rows begin with their first token, and this adapter puts a prompt before it"
    return None


def _cudnn_obstacle(query: Array, value: Array, softcap: float | None, platform: str) -> str | None:
    """Why cuDNN's flash attention cannot serve (as `jax.nn.dot_product_attention` calls it), if so."""
    width = query.shape[-1]
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this runs on {platform}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and compute_dtype is {query.dtype}"
    if softcap is not None:
        return "it has no soft-cap, and this model has one"
    if value.shape[-1] != width:
        return f"its values are as wide as its keys, and here they are {value.shape[-1]} and {width}"
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    widest = 256 if float(capability) >= 9 else 128  # from Hopper on
    if width % 8 or width > widest:
        return f"heads must be a multiple of 8 wide, up to {widest} on this GPU, and here they are {width}"
    return None


def _splash_obstacle(biased: bool, platform: str) -> str | None:
    """Why splash attention cannot serve, if so."""
    if platform != "tpu":
        return f"it needs a TPU, and this runs on {platform}"
    if biased:
        return "it has no bias of logits, and this model has one (ALiBi)"
    return None


def _split_obstacle(asked: str, query: Array, value: Array, devices: int, biased: bool) -> str | None:
    """Why columns that are split over so many devices cannot be attended to in the way asked for, if so."""
    if biased:
        return "it has no bias of logits, and this model has one (ALiBi)"
    # Heads that are split over `tensor` are dealt out further.
    taken = shards("heads", value.shape[2])
    heads, kv_heads = query.shape[2] // taken, value.shape[2] // taken
    if asked == "ulysses" and not serves(devices, heads, kv_heads):
        return f"{heads} heads ({kv_heads} of keys) cannot be dealt out to {devices} devices"
    return None


# The ways ------------------------------------------------------------------------------------------


def context_parallel_attention(
    way: Literal["ring", "ulysses"],
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K v"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B T H v"]:
    """Attention whose columns are split over the entered mesh: no device holds all keys of all heads."""
    mesh = jax.sharding.get_abstract_mesh()
    # The heads of queries can be split only where those of their keys are split alike.
    heads = "heads" if shards("heads", key.shape[2]) > 1 else None
    of_heads = partition_spec(("batch", "time", heads, None), key.shape, mesh)[0]
    of_columns = PartitionSpec(*of_heads[:2])
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    if way == "ring":
        local = functools.partial(ring_attention, axis_name=of_heads[1], **options)
    else:
        whole = functools.partial(_whole_rows, platform=_platform(), **options)
        local = functools.partial(ulysses_attention, axis_name=of_heads[1], attention_fn=whole)
    specs = (of_heads, of_heads, of_heads, of_columns, of_columns)
    split = jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)
    return split(query, key, value, positions, segment_ids)


def _whole_rows(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    platform: str,
) -> Array:
    """What `auto` takes on one device, for whole rows of some heads."""
    if _splash_obstacle(False, platform) is None:
        return splash_on_one_device(
            query, key, value, segment_ids, scale=scale, softcap=softcap, window=window, interpret=False
        )
    index = jnp.arange(query.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None]) & (index[:, None] >= index)
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None] < window
    if _cudnn_obstacle(query, value, softcap, platform) is None:
        return cudnn_attention(query, key, value, mask, segment_ids, scale=scale, window=window)
    return blocked_attention(query, key, value, mask, scale=scale, softcap=softcap, window=window)


def plain_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K v"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H v"]:
    """All logits at once, softmax in float32. Runs anywhere."""
    batch, time, heads, width = query.shape
    kv_heads = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, width)
    logits = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias.reshape(batch, kv_heads, -1, *bias.shape[2:])
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskv->btkgv", weights, value).reshape(batch, time, heads, -1)


def cudnn_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K d"],
    mask: Bool[Array, "B T T"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    bias: Float[Array, "B H T T"] | None = None,
    window: int | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H d"]:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`.

    Where every row begins with the only segment it has, causality says it all: padding at the end is seen
    by padding alone. Whether that is so is looked up at run time; else the mask goes along as a bias.

    Args:
      implementation: `xla` computes the same on any machine (for tests).
    """
    time = query.shape[1]
    fused = functools.partial(
        jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=implementation
    )

    def causal(query: Array, key: Array, value: Array) -> Array:
        return fused(query, key, value, local_window_size=None if window is None else (window - 1, 0))

    def masked(query: Array, key: Array, value: Array) -> Array:
        # With a bias, gradients need an even number of columns; the one that is added sees itself alone.
        even = time % 2
        query, key, value = (
            jnp.pad(heads, ((0, 0), (0, even), (0, 0), (0, 0))) for heads in (query, key, value)
        )
        square = jnp.pad(mask, ((0, 0), (0, even), (0, even)))[:, None]
        slanted = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, even), (0, even)))
        return fused(query, key, value, slanted, square)[:, :time]

    if bias is not None:
        return masked(query, key, value)
    alone = (segment_ids == segment_ids[:, :1]) | (segment_ids == 0)
    return jax.lax.cond(jnp.all(alone) & jnp.all(segment_ids[:, 0] > 0), causal, masked, query, key, value)
