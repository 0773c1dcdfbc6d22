"""Devices that are not here: slices of TPUs, for which programs can be compiled all the same."""

import importlib.util
import os
import re
from typing import Any

from rlhf_jax.core.errors import UserError

_EXAMPLE = "write a generation and its shape in chips, such as v5e:8x8, v5p:4x4x4, v6e:16x16 or tpu7x:2x2x2"


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, `v5e:8x8`, as the TPU compiler describes them; no TPU is needed.

    Raises:
      UserError: the TPU compiler is not installed, or knows no such slice.
    """
    if not re.fullmatch(r"[a-z0-9]+:\d+(x\d+){1,2}", name):
        raise UserError(f"--topology {name!r} is not understood: {_EXAMPLE}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs the TPU compiler, which runs on any Linux machine: "
            "pip install 'rlhf_jax[tpu-plan]'"
        )
    # Without these it looks for the machine that it would run on, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No TPU is used, so that others may plan, or use one, at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # The two cores of a v4 chip are one device, as they are on Cloud TPU.
    fused = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **fused).devices)
    except Exception as error:  # the plugin's own kinds of errors, which differ by version
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {name}: there is no such slice ({reason}): {_EXAMPLE}") from error
