"""Devices that are not here, for which programs can be compiled all the same: TPUs and NVIDIA GPUs."""

import importlib.util
import os
import re
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.planning.gpu_targets import GPU_TARGETS

_EXAMPLE = (
    "write a generation and its shape in chips, such as v5e:8x8, v5p:4x4x4, v6e:16x16 or tpu7x:2x2x2, "
    f"or a GPU and how many: h100:8, h200:64 ({', '.join(GPU_TARGETS)})"
)

GPUS_OF_A_NODE = 8


def topology_devices(name: str) -> list[Any]:
    """The devices of `v5e:8x8` or `h100:8`, as their compiler describes them; none of them is needed here.

    Raises:
      UserError: their compiler is not installed, or knows no such devices.
    """
    name = name.lower()
    if found := re.fullmatch(r"([a-z0-9]+):(\d+)", name):
        return _gpus(name, found[1], int(found[2]))
    if not re.fullmatch(r"[a-z0-9]+:\d+(x\d+){1,2}", name):
        raise UserError(f"--topology {name!r} is not understood: {_EXAMPLE}")
    if name.partition(":")[0] in GPU_TARGETS:
        raise UserError(f"--topology {name}: GPUs have no shape, only a number: {_EXAMPLE}")
    return _tpus(name)


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs the TPU compiler, which runs on any Linux machine: "
            "pip install 'rlhf_jax[tpu-plan]'"
        )
    # Without these it looks for the machine that it would run on, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Of that machine, too, and warns where it is not told; the slice that is compiled for is `topology_name`.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    # No TPU is used, so that others may plan, or use one, at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a v4 chip are one device, as they are on Cloud TPU.
    fused = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    return _described(name, "tpu", topology_name=name, **fused)


def _gpus(name: str, kind: str, count: int) -> list[Any]:
    """Nodes of eight, or one of fewer."""
    if kind not in GPU_TARGETS or count < 1 or (count > GPUS_OF_A_NODE and count % GPUS_OF_A_NODE):
        raise UserError(f"--topology {name}: there is no such machine: {_EXAMPLE}")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"--topology {name} needs the GPU compiler, which runs on any Linux machine: "
            "pip install 'rlhf_jax[gpu-plan]'"
        )
    # There is nothing to time variants on, and Triton's products are chosen by timing them.
    unmeasured = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {unmeasured}".strip()
    nodes = -(-count // GPUS_OF_A_NODE)
    return _described(
        name,
        "cuda",
        topology_name=kind,
        topology=f"1x{nodes}x{count // nodes}",
        target_config=GPU_TARGETS[kind].to_text(),
    )


def _described(name: str, platform: str, **how: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **how).devices)
    except Exception as error:  # the plugin's own kinds of errors, which differ by version
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {name}: there is no such slice ({reason}): {_EXAMPLE}") from error
