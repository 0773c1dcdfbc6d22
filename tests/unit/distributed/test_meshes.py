import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.axes import MESH_AXES, all_gathered, axis_rules, constrain, partition_spec, shards
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import named_leaves


def abstract(**sizes):
    """A mesh without devices: enough to see where things would go."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def test_no_spec_and_auto_on_one_device():
    for spec in ("", "auto", "fsdp=1", " data=1 , tensor=1 "):
        mesh = distributed.make_mesh(spec)
        assert mesh.axis_names == MESH_AXES
        assert mesh.size == 1
        assert set(mesh.axis_types) == {AxisType.Auto}
    assert distributed.describe_mesh(distributed.make_mesh()) == "one device (cpu)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp", "'fsdp' is no axis with a size"),
        ("fsdp=1,", "'' is no axis with a size"),
        ("rows=2", "there is no axis 'rows': choose among pipeline, data, fsdp, expert, sequence, tensor"),
        ("data=1,data=1", "data is given twice"),
        ("data=0", "'0' is no size of data"),
        ("data=-1", "'-1' is no size"),
        ("data=two", "'two' is no size"),
        ("data=²", "'²' is no size"),
        ("data=2,fsdp=4", "needs 8 devices and there are 1: .*JAX_NUM_CPU_DEVICES=8"),
    ],
)
def test_a_wrong_spec_is_one_sentence(spec, message):
    with pytest.raises(UserError, match=message) as raised:
        distributed.make_mesh(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("here", "is not understood"),
        ("a:1,2", "is not understood"),
        ("a:1,2,x", "is not understood"),
        ("a,2,0", "is not understood"),
        ("a:1,2,2", "index 2 is not below the count 2"),
    ],
)
def test_wrong_hosts_are_one_sentence(hosts, message):
    with pytest.raises(UserError, match=message):
        distributed.init_distributed(distributed.DistributedOptions(hosts))
    with pytest.raises(UserError, match="--heartbeat-timeout 0 is not positive"):
        distributed.init_distributed(distributed.DistributedOptions("auto", heartbeat_timeout=0))


def state_shapes(config):
    tx = make_optimizer(OptimizerConfig())
    return jax.eval_shape(lambda key: sft.init(models.init_params(config, key), tx, key), jax.random.key(0))


DENSE = models.dense_config(
    vocab_size=32,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_matrix_and_its_moments_are_split(scan_layers):
    config = models.config_from_dict({**models.config_to_dict(DENSE), "scan_layers": scan_layers})
    shapes = state_shapes(config)
    specs = {
        name: sharding.spec
        for name, sharding in named_leaves(
            distributed.tree_shardings(abstract(data=2, fsdp=4, tensor=2), shapes)
        ).items()
    }
    where = "layers" if scan_layers else "layer_1"
    stacked = (None,) if scan_layers else ()
    for tree in ("params", "opt_state/1/mu", "opt_state/1/nu"):
        layer = f"learner/{tree}/{where}"
        assert specs[f"learner/{tree}/embedding"] == P("tensor", "fsdp")
        assert specs[f"learner/{tree}/unembedding"] == P("tensor", "fsdp")
        for name in ("query", "key", "value"):
            assert specs[f"{layer}/attention/{name}/kernel"] == P(*stacked, "fsdp", "tensor")
        assert specs[f"{layer}/attention/output/kernel"] == P(*stacked, "tensor", "fsdp")
        assert specs[f"{layer}/feed_forward/up/kernel"] == P(*stacked, "fsdp", "tensor")
        assert specs[f"{layer}/feed_forward/down/kernel"] == P(*stacked, "tensor", "fsdp")
    matrices = [name for name in specs if name.rpartition("/")[2] in ("kernel", "embedding", "unembedding")]
    assert len(matrices) == (3 * 9 if scan_layers else 3 * 16)
    for name in specs.keys() - set(matrices):
        assert all(entry is None for entry in specs[name]), name


def split(name, shape, **mesh):
    return partition_spec(distributed.logical_axes(name, len(shape)), shape, abstract(**mesh))


def test_experts_latents_and_adapters():
    mesh = {"fsdp": 2, "tensor": 2, "expert": 2}
    assert split("layers/feed_forward/gate", (3, 4, 8, 6), **mesh)[0] == P(None, "expert", "fsdp", "tensor")
    assert split("layer_0/feed_forward/down", (4, 6, 8), **mesh)[0] == P("expert", "tensor", "fsdp")
    assert split("layer_0/block_1_feed_forward/up", (4, 8, 6), **mesh)[0] == P("expert", "fsdp", "tensor")
    assert split("layer_0/feed_forward/shared/up/kernel", (8, 6), **mesh)[0] == P("fsdp", "tensor")
    assert split("layer_0/feed_forward/router/kernel", (8, 4), **mesh)[0] == P(None, None)
    assert split("layer_0/attention/expand", (4, 8), **mesh)[0] == P(None, "tensor")
    assert split("layer_0/attention/query_down/kernel", (8, 4), **mesh)[0] == P("fsdp", None)
    assert split("layer_0/attention/query/bias", (8,), **mesh)[0] == P("tensor")
    # A factor of an adapter is split as the side of the kernel that it shares.
    for layer in ("attention/query", "attention/output", "feed_forward/up", "feed_forward/down"):
        kernel = split(f"layer_0/{layer}/kernel", (8, 8), **mesh)[0]
        assert split(f"lora/layer_0/{layer}/lora_a", (8, 2), **mesh)[0] == P(kernel[0], None)
        assert split(f"lora/layer_0/{layer}/lora_b", (2, 8), **mesh)[0] == P(None, kernel[1])


def test_stacked_layers_are_split_over_a_pipeline():
    mesh = {"pipeline": 2, "fsdp": 2, "expert": 2}
    assert split("learner/params/layers/attention/query/kernel", (4, 8, 8), **mesh)[0] == P(
        "pipeline", "fsdp", None
    )
    assert split("opt_state/1/mu/layers/attention_norm/scale", (4, 8), **mesh)[0] == P("pipeline", None)
    assert split("layers/feed_forward/gate", (4, 2, 8, 6), **mesh)[0] == P("pipeline", "expert", "fsdp", None)
    assert split("layers/attention/query/lora_a", (3, 8, 2), **mesh)[0] == P(None, "fsdp", None)
    assert split("embedding", (32, 8), **mesh)[0] == P(None, "fsdp")


def test_what_does_not_divide_stays_whole_and_is_named():
    assert split("layer_0/attention/query/kernel", (6, 8), fsdp=4, tensor=2) == (
        P(None, "tensor"),
        ("embed",),
    )
    config = models.dense_config(vocab_size=33, width=16, num_layers=2, num_heads=4, intermediate_size=32)
    mesh = abstract(tensor=4)
    summary, fallbacks = distributed.describe_shardings(mesh, state_shapes(config))
    assert fallbacks == [
        "params/embedding [33, 16] is whole along vocab",
        "mu/embedding [33, 16] is whole along vocab",
        "nu/embedding [33, 16] is whole along vocab",
    ]
    total, local = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|on)", summary))
    kernels = 3 * 4 * 2 * (4 * 16 * 16 + 3 * 16 * 32)
    assert total - local == kernels * 3 // 4


def test_rules_can_be_changed():
    with axis_rules({"embed": ("fsdp", "data"), "vocab": ()}):
        assert split("embedding", (32, 16), data=2, fsdp=4, tensor=2)[0] == P(None, ("fsdp", "data"))
    assert split("embedding", (32, 16), data=2, fsdp=4, tensor=2)[0] == P("tensor", "fsdp")
    table = [("embedding", ("embed", None)), *distributed.PARAMETER_AXES]
    sharding = distributed.tree_shardings(
        abstract(fsdp=4), {"embedding": jax.ShapeDtypeStruct((8, 6), jnp.float32)}, table
    )
    assert sharding["embedding"].spec == P("fsdp", None)


def test_a_mesh_axis_serves_one_dimension():
    with axis_rules({"heads": ("fsdp",)}):
        assert split("layer_0/attention/query/kernel", (8, 8), fsdp=4)[0] == P("fsdp", None)


def test_without_a_mesh_nothing_is_constrained():
    traced = jax.make_jaxpr(lambda x: constrain(x, "batch", None))(jnp.ones((4, 2)))
    assert not traced.eqns
    assert shards("batch", 8) == 1
    with jax.set_mesh(distributed.make_mesh("auto")):
        assert not jax.make_jaxpr(lambda x: constrain(x, "batch", None))(jnp.ones((4, 2))).eqns
    with jax.sharding.use_abstract_mesh(abstract(data=2, fsdp=2)):
        assert shards("batch", 8) == 4
        assert shards("batch", 6) == 1
        assert len(jax.make_jaxpr(lambda x: constrain(x, "batch", None))(jnp.ones((4, 2))).eqns) == 1


def test_one_device_takes_batches_and_states_as_they_are():
    rows = {"a": np.arange(6).reshape(3, 2), "b": np.float32(2)}
    placed = distributed.shard_batch(rows)
    assert np.array_equal(placed["a"], rows["a"])
    assert placed["b"].shape == ()
    assert distributed.shard_batch(placed)["a"] is placed["a"]
    assert distributed.local_rows(3).tolist() == [0, 1, 2]
    assert np.array_equal(distributed.local_values(placed["a"]), rows["a"])
    made = distributed.init_sharded(
        lambda key: {"embedding": jax.random.normal(key, (4, 2))}, jax.random.key(1)
    )
    assert np.array_equal(made["embedding"], jax.random.normal(jax.random.key(1), (4, 2)))


def test_a_gradient_goes_back_to_where_its_parameter_lives():
    def specs(use):
        program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(use(x)))))(jnp.ones((4, 2)))
        return [e.params["sharding"].spec for e in program.eqns if e.primitive.name == "sharding_constraint"]

    plain = lambda x: constrain(x, "vocab", None)  # noqa: E731
    straight = lambda x: all_gathered(x, "vocab", "embed")  # noqa: E731
    with jax.sharding.use_abstract_mesh(abstract(fsdp=2)):
        assert specs(plain) == [P(None, None)] * 2  # summed and held whole everywhere
        assert specs(straight) == [P(None, "fsdp")]  # that of the values stands within the custom rule
    x = jnp.arange(8.0).reshape(4, 2)
    assert np.array_equal(jax.grad(lambda x: jnp.sum(straight(x) ** 2))(x), 2 * x)
