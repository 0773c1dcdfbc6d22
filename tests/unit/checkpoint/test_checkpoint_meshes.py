"""A state saved on one mesh, or by several processes, is restored bit for bit on another."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoint import CheckpointManager

MESHES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rlhf_jax.checkpoint import CheckpointManager

def layout(shape, spec):
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    return NamedSharding(mesh, spec)

layouts = [layout((8,), P("a")), layout((2, 4), P("b", "a")), layout((4, 2), P(None, "a")), layout((8,), P())]
weights = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)

def make_state(sharding, weights):
    replicated = NamedSharding(sharding.mesh, P())
    keys = jax.random.split(jax.random.key(int(weights[0, 0] != 0)), 8)
    return {
        "weights": jax.device_put(weights, sharding),
        "keys": jax.device_put(keys, NamedSharding(sharding.mesh, P("a"))),
        "weak": jax.device_put(jnp.asarray(3 * int(weights[0, 0] != 0)), replicated),
    }

pairs = 0
for i, source in enumerate(layouts):
    saved = make_state(source, weights)
    with CheckpointManager(f"{sys.argv[1]}/{i}") as manager:
        manager.save(1, saved, wait=True)
        for target in layouts:
            like = make_state(target, 0 * weights)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            for example in (like, shapes):
                _, restored, _ = manager.restore(example)
                assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, like))
                assert np.asarray(restored["weights"]).tobytes() == weights.tobytes()
                assert (jax.random.key_data(restored["keys"]) == jax.random.key_data(saved["keys"])).all()
                assert restored["weak"] == 3
            pairs += 1
print(pairs, "pairs")
"""

PROCESSES = """
import sys, jax
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rlhf_jax.checkpoint import CheckpointManager

mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
replicated = NamedSharding(mesh, P())
weights = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)

def make_state(step):
    value, sharding = weights * step, NamedSharding(mesh, P("a"))
    return {
        "weights": jax.make_array_from_callback(value.shape, sharding, lambda i: value[i]),
        "key": jax.jit(lambda: jax.random.key(step), out_shardings=replicated)(),
        "host": np.arange(3) * step,
    }

overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
with CheckpointManager(folder) as manager:
    for step in (1, 2):
        state = make_state(step)
        manager.save(step, state)
        overwrite(state["weights"]).block_until_ready()
    step, restored, _ = manager.restore(make_state(0))
assert step == 2
for shard in restored["weights"].addressable_shards:
    assert (np.asarray(shard.data) == 2 * weights[shard.index]).all()
keys = [np.asarray(jax.random.key_data(x["key"])) for x in (restored, make_state(2))]
assert (keys[0] == keys[1]).all()
print("process", index, "restored", step)
"""


def test_sixteen_pairs_of_meshes(tmp_path):
    command = [sys.executable, "-c", MESHES, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "16 pairs\n"


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, "-c", PROCESSES, str(index), str(port), str(tmp_path)] for index in (0, 1)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"process {index} restored 2" in output
    like = {"weights": jnp.zeros((16, 24)), "key": jax.random.key(0), "host": np.zeros(3, int)}
    step, restored, _ = CheckpointManager(tmp_path).restore(like)
    assert step == 2
    assert np.array_equal(restored["weights"], 2 * np.arange(16 * 24, dtype=np.float32).reshape(16, 24))
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(jax.random.key(2)))
    assert restored["host"].tolist() == [0, 2, 4]
