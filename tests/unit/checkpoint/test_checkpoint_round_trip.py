"""What is saved comes back bit for bit, as the kind of thing it was, where it was."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from rlhf_jax.checkpoint import CheckpointManager, read_manifest, restore_params
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves, pytree_dataclass


@pytree_dataclass
class State:
    params: dict
    optimizer: object
    key: jax.Array
    step: jax.Array
    moments: object = None


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "layers": [
            {"kernel": jax.random.normal(key, (3, 4))},
            {"kernel": jnp.full((2,), -0.0, jnp.bfloat16)},
        ],
        "a/b": jnp.arange(4),
    }
    optimizer = optax.adamw(1e-3).init({"kernel": params["layers"][0]["kernel"]})
    return State(params, optimizer, jax.random.split(key, 3), jnp.asarray(7))


def bits(leaf) -> tuple:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        return "key", str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return isinstance(leaf, jax.Array), str(array.dtype), array.shape, array.tobytes()


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), y in zip(named_leaves(a).items(), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y), name
        assert type(x) is type(y), name


def test_state_comes_back_with_its_classes_and_keys(tmp_path):
    state = make_state()
    with CheckpointManager(tmp_path / "run", config={"width": 4}) as manager:
        manager.save(7, state, extra={"data": "abc", "position": [1, 2]}, wait=True)
        step, restored, extra = manager.restore(make_state(1))
    assert (step, extra) == (7, {"data": "abc", "position": [1, 2]})
    assert_same(state, restored)
    assert jnp.array_equal(jax.random.normal(restored.key[1]), jax.random.normal(state.key[1]))


DTYPES = [
    np.float16,
    np.float32,
    np.float64,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
]
DTYPES += [np.uint64, np.complex64, np.complex128, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
DTYPES += [ml_dtypes.float8_e5m2]


def test_every_dtype_and_every_bit_pattern(tmp_path):
    rng = np.random.default_rng(0)
    raw = {np.dtype(d).name: rng.integers(0, 256, (64, np.dtype(d).itemsize), np.uint8) for d in DTYPES}
    raw["bool"] %= 2
    state = {name: x.view(np.dtype(name))[:, 0] for name, x in raw.items()}
    state["int4"] = np.arange(-8, 8).astype(ml_dtypes.int4)
    state["nan"] = np.array([0x7FC12345, 0xFFC00001, 0x7F800001], np.uint32).view(np.float32)
    state["negative_zero"] = np.full((8, 8), -0.0, np.float32)
    state |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.float32(1.5), "zero_d": np.array(2.0)}
    on_device = {
        name: jnp.asarray(state[name]) for name in ("bfloat16", "float16", "nan", "int4", "negative_zero")
    }
    everything = {
        "host": state,
        "device": on_device,
        "python": [True, 3, 0.1, 1j],
        "none": None,
        "nothing": {},
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, everything, wait=True)
        _, restored, _ = manager.restore(everything)
    assert_same(everything, restored)
    assert [type(x) for x in restored["python"]] == [bool, int, float, complex]


def test_keys_of_every_kind_and_empty_ones(tmp_path):
    state = {impl: jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")}
    state["none"] = jax.random.split(jax.random.key(0), 4)[:0]
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state, wait=True)
        _, restored, _ = manager.restore(state)
        _, from_shapes, _ = manager.restore(jax.eval_shape(lambda: state))
        with pytest.raises(UserError, match=r"leaf `rbg` is key<rbg>\[\] in the checkpoint but key<fry>\[\]"):
            manager.restore(state | {"rbg": jax.random.key(0)})
    assert_same(state, restored)
    assert_same(state, from_shapes)


def test_weak_types_and_free_placement_survive(tmp_path):
    """A resume must neither compile anew nor promote differently."""
    state = {"weak": jnp.asarray(0.1), "strong": jnp.float32(0.1), "array": jnp.ones(3)}
    device = jax.devices()[0]
    state |= {
        "bound": jax.device_put(jnp.ones(2), device),
        "weak_bound": jax.device_put(jnp.asarray(2), device),
    }
    traces = []
    step = jax.jit(lambda x: traces.append(1) or x)
    step(state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state, wait=True)
        _, restored, _ = manager.restore(state)
        _, from_shapes, _ = manager.restore(jax.eval_shape(lambda: state))
    step(restored)
    step(from_shapes)
    assert len(traces) == 1
    assert jax.tree.map(lambda x: x.committed, restored) == jax.tree.map(lambda x: x.committed, state)
    assert jax.tree.map(lambda x: x.weak_type, restored) == jax.tree.map(lambda x: x.weak_type, state)


def test_a_wide_dtype_is_not_narrowed_silently(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"x": np.array([2**40])}, wait=True)
        with pytest.raises(TypeError, match="`x` is int64"):
            manager.restore({"x": jax.ShapeDtypeStruct((1,), np.int64)})
        with jax.enable_x64(True):
            _, restored, _ = manager.restore({"x": jax.ShapeDtypeStruct((1,), np.int64)})
    assert bits(np.asarray(restored["x"])) == bits(np.array([2**40]))


def test_buffers_may_be_donated_and_arrays_written_while_a_save_is_under_way(tmp_path):
    @jax.jit
    def fill(value):
        return jnp.full((512, 512), value, jnp.float32)

    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with CheckpointManager(tmp_path, max_to_keep=10) as manager:
        for step in range(8):
            state = {"device": fill(step), "host": np.full((512, 512), step)}
            manager.save(step, state)
            state["host"][:] = -1
            for _ in range(3):
                state["device"] = overwrite(state["device"])
            state["device"].block_until_ready()
        manager.wait()
        for step in range(8):
            _, restored, _ = manager.restore({"device": fill(0), "host": np.zeros((512, 512), int)}, step)
            assert np.all(restored["device"] == step)
            assert np.all(restored["host"] == step)


def test_parameters_start_another_stage(tmp_path):
    state = make_state()
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, {"policy": state, "value": {"params": jnp.zeros(2)}}, wait=True)
    step, params = restore_params(tmp_path, jax.eval_shape(lambda: state.params), name="policy/params")
    assert step == 3
    assert_same(state.params, params)
    with pytest.raises(UserError, match="holds no `params`: it holds policy, value"):
        restore_params(tmp_path, state.params)
    wider = state.params | {"layers": [{"kernel": jnp.zeros((3, 8))}, state.params["layers"][1]]}
    message = r"`policy/params` of step 3.*`layers/0/kernel` is float32\[3, 4\].*\[3, 8\]"
    with pytest.raises(UserError, match=message):
        restore_params(tmp_path, wider, name="policy/params")


def test_the_manifest_says_what_was_saved(tmp_path):
    with CheckpointManager(tmp_path, config={"width": 4, "rate": float("nan")}) as manager:
        manager.save(5, make_state(), extra={"fingerprint": "ä\ud800"}, wait=True)
    manifest = read_manifest(tmp_path)
    assert manifest.step == 5
    assert str(manifest.leaves["params/layers/0/kernel"]) == "float32[3, 4]"
    assert manifest.leaves["key"].dtype == "key<fry>"
    assert manifest.config is not None
    assert manifest.config["width"] == 4
    assert manifest.extra == {"fingerprint": "ä\ud800"}
    assert manifest.versions["jax"] == jax.__version__
    assert any(name.startswith("arrays/") for name in manifest.files)
    with pytest.raises(UserError, match="no readable manifest of step 6"):
        read_manifest(tmp_path, 6)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": "text"}, "leaf `a` .str."),
        ({"a": np.array(["x"])}, "leaf `a`"),
        ({"a": np.zeros(2, ">f4")}, "leaf `a`"),
        ({"a": object()}, "leaf `a` .object."),
    ],
)
def test_what_is_not_an_array_is_refused_at_once(tmp_path, state, message):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(TypeError, match=message):
            manager.save(0, state)
        with pytest.raises(TypeError, match="JSON"):
            manager.save(0, {}, extra={"x": object()})
        with pytest.raises(ValueError, match="same `a/b` name"):
            manager.save(0, {"a/b": np.ones(1), "a": {"b": np.ones(1)}})
        manager.save(0, {}, wait=True)
        assert manager.restore({}) == (0, {}, None)
