"""Every way of computing attention against the plain one, as far as a CPU can run it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.models.attention import backends
from rlhf_jax.models.attention.backends import (
    AttentionContext,
    blocked_attention,
    choose_backend,
    cudnn_attention,
    plain_attention,
)
from rlhf_jax.models.attention.splash import splash_attention

# Rows without padding, with padding at the end, before, and two segments in a row.
FULL, RIGHT, LEFT, PACKED = [1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7, [1] * 4 + [2] * 3 + [0] * 2


def _case(rows, *, heads=4, kv_heads=2, width=8):
    """Queries, keys, values, and who may see whom."""
    segments = jnp.array(rows)
    batch, time = segments.shape
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, width))
    arrays = [jax.random.normal(k, (batch, time, *s)) for k, s in zip(keys, shapes, strict=True)]
    columns = jnp.broadcast_to(jnp.arange(time), (batch, time))
    causal = columns[:, :, None] >= columns[:, None, :]
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    return arrays, AttentionContext(columns, columns, mask, jnp.int32(0), segments, segments > 0)


def _values_and_gradients(function, arrays, segments):
    """Outputs where there are tokens, and gradients of something that reads only those."""

    def loss(*arrays):
        outputs = jnp.where((segments > 0)[..., None, None], function(*arrays), 0)
        return jnp.sum(outputs**2), outputs

    gradients, outputs = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [outputs, *gradients]


def _assert_same(function, arrays, context, *, window=None, **options):
    plain = functools.partial(plain_attention, mask=context.seen(window), **options)
    expected = _values_and_gradients(plain, arrays, context.segment_ids)
    actual = _values_and_gradients(function, arrays, context.segment_ids)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("rows", [[FULL, RIGHT], [LEFT, PACKED]], ids=["right", "left and packed"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_calls_to_cudnn_say_who_sees_whom(rows, window):
    """The same calls, computed by XLA; 9 columns, which cuDNN wants even where it gets a bias."""
    arrays, context = _case(rows)
    call = functools.partial(
        cudnn_attention,
        mask=context.seen(window),
        segment_ids=context.segment_ids,
        scale=0.3,
        window=window,
        implementation="xla",
    )
    _assert_same(call, arrays, context, window=window, scale=0.3)


def test_the_calls_to_cudnn_carry_a_bias():
    arrays, context = _case([FULL, RIGHT])
    bias = -0.1 * jnp.arange(1, 5)[:, None, None] * context.distance()[:, None]
    options = {"scale": 0.3, "bias": bias}
    call = functools.partial(
        cudnn_attention, mask=context.mask, segment_ids=context.segment_ids, implementation="xla", **options
    )
    _assert_same(call, arrays, context, **options)


@pytest.mark.parametrize(
    ("window", "softcap", "biased"),
    [(None, None, True), (20, 2.0, False)],
    ids=["bias", "window and soft-cap"],
)
def test_blocks(window, softcap, biased):
    """Three blocks of queries, the last one shorter; the window ends in the block before."""
    rows = [[1] * 140, [0] * 20 + [1] * 120, [1] * 60 + [2] * 60 + [0] * 20]
    arrays, context = _case(rows, width=4)
    bias = -0.1 * jnp.arange(1, 5)[:, None, None] * context.distance()[:, None] if biased else None
    options = {"scale": 0.3, "softcap": softcap, "bias": bias}
    call = functools.partial(blocked_attention, mask=context.seen(window), window=window, **options)
    _assert_same(call, arrays, context, window=window, **options)


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_behind_a_soft_prompt(window):
    """Columns before the first token are seen by every block, those of a window only from near."""
    arrays, context = _case([[1] * 140, [0] * 20 + [1] * 120, [1] * 60 + [2] * 60 + [0] * 20], width=4)
    query, *own = arrays
    soft = [jax.random.normal(jax.random.key(n), (3, 5, 2, 4)) for n in (1, 2)]
    key, value = (jnp.concatenate(both, axis=1) for both in zip(soft, own, strict=True))
    behind = context.behind_prompt(5)
    bias = -0.1 * jnp.arange(1, 5)[:, None, None] * behind.distance()[:, None]
    for slanted in (None, bias):
        call = functools.partial(
            blocked_attention, mask=behind.seen(window), window=window, scale=0.3, bias=slanted
        )
        _assert_same(call, (query, key, value), behind, window=window, scale=0.3, bias=slanted)


def test_blocks_in_bfloat16_are_as_close_as_the_plain_way():
    arrays, context = _case([FULL, PACKED])
    exact = plain_attention(*arrays, context.mask, scale=0.3)
    halves = [array.astype(jnp.bfloat16) for array in arrays]
    for function in (plain_attention, blocked_attention):
        outputs = function(*halves, context.mask, scale=0.3)
        assert outputs.dtype == jnp.bfloat16
        np.testing.assert_allclose(outputs.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize(
    ("window", "softcap"), few([(None, None), (40, 2.0)], (40, 2.0)), ids=["causal", "window and soft-cap"]
)
def test_splash_attention_run_by_the_interpreter(window, softcap):
    """Two blocks of columns after padding, grouped heads, every kind of row."""
    rows = [[1] * 140, [0] * 20 + [1] * 120, [1] * 60 + [2] * 60 + [0] * 20]
    arrays, context = _case(rows, heads=2, kv_heads=1, width=16)
    options = {"scale": 0.3, "softcap": softcap}
    call = functools.partial(
        splash_attention, segment_ids=context.segment_ids, window=window, interpret=True, **options
    )
    _assert_same(call, arrays, context, window=window, **options)


CONFIG = models.dense_config(
    vocab_size=8, width=256, num_layers=1, num_heads=4, num_kv_heads=2, compute_dtype="bfloat16"
)


def _lowered(config, platform):
    """The program of a gradient, for a machine that is not here."""
    params = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
    tokens = jnp.zeros((2, 128), jnp.int32)

    def loss(params):
        return jnp.sum(models.hidden_states(config, params, tokens, tokens, tokens + 1))

    return jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_on_gpus_cudnn_is_called(monkeypatch, remat):
    monkeypatch.setattr(backends, "_platform", lambda: "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    text = _lowered(dataclasses.replace(CONFIG, remat=remat), "cuda")
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    plain = _lowered(dataclasses.replace(CONFIG, attention_backend="plain"), "cuda")
    assert "cudnn" not in plain


def test_on_tpus_the_splash_kernel_is_called(monkeypatch):
    monkeypatch.setattr(backends, "_platform", lambda: "tpu")
    assert _lowered(CONFIG, "tpu").count("tpu_custom_call") >= 3
    assert "tpu_custom_call" not in _lowered(dataclasses.replace(CONFIG, attention_backend="plain"), "tpu")


BF16 = {
    "dtype": jnp.bfloat16,
    "width": 64,
    "value_width": 64,
    "softcap": None,
    "biased": False,
    "prompted": 0,
}


@pytest.mark.parametrize(
    ("asked", "platform", "change", "expected"),
    [
        ("auto", "cpu", {"softcap": 5.0, "biased": True}, "blocked"),
        ("auto", "rocm", {}, "blocked"),
        ("auto", "gpu", {}, "cudnn"),
        ("auto", "a GPU that is not here", {}, "blocked"),
        ("auto", "gpu", {"biased": True}, "cudnn"),
        ("auto", "gpu", {"dtype": jnp.float32}, "blocked"),
        ("auto", "gpu", {"softcap": 5.0}, "blocked"),
        ("auto", "gpu", {"width": 256, "value_width": 256}, "blocked"),
        ("auto", "gpu", {"value_width": 32}, "blocked"),
        ("auto", "tpu", {"softcap": 5.0, "value_width": 32}, "splash"),
        ("auto", "tpu", {"biased": True}, "blocked"),
        ("plain", "gpu", {}, "plain"),
        ("ring", "gpu", {}, "cudnn"),
        ("ulysses", "cpu", {}, "blocked"),
        ("cudnn", "cpu", {}, "needs an NVIDIA GPU, and this runs on cpu"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, "compute_dtype is float32"),
        ("cudnn", "gpu", {"softcap": 5.0}, "no soft-cap"),
        ("cudnn", "gpu", {"width": 260, "value_width": 260}, "up to 128 on this GPU, and here they are 260"),
        ("cudnn", "gpu", {"value_width": 32}, "here they are 32 and 64"),
        ("splash", "cpu", {}, "needs a TPU, and this runs on cpu"),
        ("splash", "tpu", {"biased": True}, r"no bias of logits.*choose auto"),
        ("auto", "gpu", {"prompted": 3}, "blocked"),
        ("auto", "tpu", {"prompted": 3}, "blocked"),
        ("plain", "tpu", {"prompted": 3}, "plain"),
        ("cudnn", "gpu", {"prompted": 3}, "this adapter puts a prompt before it"),
        ("splash", "tpu", {"prompted": 3}, "this adapter puts a prompt before it"),
    ],
)
def test_the_choice(asked, platform, change, expected):
    case = {**BF16, **change}
    query = jax.ShapeDtypeStruct((2, 8, 4, case["width"]), case["dtype"])
    columns = 8 + case["prompted"]
    value = jax.ShapeDtypeStruct((2, columns, 4, case["value_width"]), case["dtype"])
    nothing = jnp.zeros(0, jnp.int32)
    context = AttentionContext(nothing, nothing, nothing, nothing, segment_ids=nothing, present=nothing)

    def choose(context):
        options = {name: case[name] for name in ("softcap", "biased")}
        return choose_backend(asked, query, value, context, platform=platform, **options)

    if expected in ("plain", "blocked", "cudnn", "splash"):
        assert choose(context) == expected
    else:
        with pytest.raises(UserError, match=f"attention_backend={asked} cannot be used: .*{expected}"):
            choose(context)
    # A step of decoding is plain, whatever was asked for.
    assert choose(dataclasses.replace(context, segment_ids=None)) == "plain"


@pytest.mark.parametrize(
    ("asked", "devices", "biased", "expected"),
    [
        ("auto", 4, False, "ring"),
        ("auto", 4, True, "plain"),
        ("blocked", 4, False, "blocked"),
        ("ring", 4, False, "ring"),
        ("ring", 4, True, "no bias of logits"),
        ("ulysses", 4, False, "ulysses"),
        ("ulysses", 2, False, "ulysses"),
        ("ulysses", 8, False, r"4 heads \(2 of keys\) cannot be dealt out to 8 devices"),
        ("ulysses", 4, True, "no bias of logits"),
    ],
)
def test_the_choice_where_columns_are_split(asked, devices, biased, expected):
    query = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.float32)
    value = jax.ShapeDtypeStruct((2, 8, 2, 16), jnp.float32)
    prompted = jax.ShapeDtypeStruct((2, 11, 2, 16), jnp.float32)
    context = AttentionContext(*[jnp.zeros(0, jnp.int32)] * 6)
    mesh = jax.sharding.AbstractMesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        choose = functools.partial(
            choose_backend, asked, query, value, context, softcap=None, biased=biased, platform="cpu"
        )
        if expected in ("ring", "ulysses", "plain", "blocked"):
            assert choose() == expected
        else:
            with pytest.raises(UserError, match=f"attention_backend={asked} cannot be used: .*{expected}"):
                choose()
        alike = {"softcap": None, "biased": False, "platform": "cpu"}
        assert choose_backend("auto", query, prompted, context, **alike) == "blocked"
