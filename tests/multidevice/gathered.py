"""Bytes that fsdp=8 sends in a step of SFT, as it is and with an optimizer state that is gathered."""

import dataclasses
import json

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import distributed, models
from rlhf_jax.planning import compiled, steps

if __name__ == "__main__":
    config = models.dense_config(vocab_size=512, width=64, num_layers=4, num_heads=4, scan_layers=True)
    mesh = distributed.make_mesh("fsdp=8")
    program = steps.build(steps.workload_step(steps.Workload("sft", config, 16, 64)), mesh)[1]["update"]
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.arguments[0].learner.params))
    whole = NamedSharding(mesh, PartitionSpec())

    def broken(state, *data):
        moments = jax.lax.with_sharding_constraint(state.learner.opt_state, whole)
        learner = dataclasses.replace(state.learner, opt_state=moments)
        return program.function(dataclasses.replace(state, learner=learner), *data)

    as_it_is = compiled.predict(program, mesh)
    gathered = compiled.predict(dataclasses.replace(program, function=broken), mesh)
    print(
        json.dumps(
            {
                "on paper": 4 * 7 / 8 * params,
                "as it is": as_it_is.sent_bytes,
                "broken": gathered.sent_bytes,
                "complaints": as_it_is.complaints,
            }
        )
    )
