"""Meshes from what a user writes after `--mesh`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from rlhf_jax.core.axes import MESH_AXES
from rlhf_jax.core.errors import UserError

_EXAMPLE = "write axes and sizes, such as data=2,fsdp=4, or auto"


def make_mesh(spec: str = "", *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `spec` describes; all of `core.axes.MESH_AXES` are in it, those not named with size 1.

    Axes are `Auto`: the compiler inserts communication, which is what the modules here are written for
    (`jax.make_mesh` makes `Explicit` ones otherwise).

    Args:
      spec: `data=2,fsdp=4`; `auto` for fsdp over all devices; empty for one device.
      devices: to choose from; all of them by default. The first ones are taken, as many as are asked for.

    Raises:
      UserError: `spec` is not of this form, or asks for more devices than there are, or, with several
        processes, for fewer.
    """
    elsewhere, devices = devices is not None, jax.devices() if devices is None else devices
    sizes = _parse(spec.strip(), len(devices))
    count = math.prod(sizes.values())
    if count > len(devices):
        more = "name a larger slice" if elsewhere else f"on CPU set JAX_NUM_CPU_DEVICES={count}"
        raise UserError(
            f"--mesh {spec} needs {count} devices and there are {len(devices)}: lower a size, or {more}"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"--mesh {spec or '(none)'} uses {count} of {len(devices)} devices, and every one of "
            f"{jax.process_count()} processes needs its part: give sizes whose product is {len(devices)}"
        )
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[:count])
    except NotImplementedError:  # an axis of the mesh that is a part of one of the torus: tensor=4 on 16x16
        layout = mesh_utils.create_device_mesh(shape, devices[:count], allow_split_physical_axes=True)
        return Mesh(layout, MESH_AXES, axis_types=types)


def abstract_mesh(spec: str) -> AbstractMesh:
    """The mesh that `spec` describes, of no devices: for shapes and shardings alone.

    Raises:
      UserError: `spec` is not of its form; `auto` is not, where there is nothing to count.
    """
    if spec.strip() == "auto":
        raise UserError(f"--mesh auto has no devices to count here: {_EXAMPLE.removesuffix(', or auto')}")
    sizes = _parse(spec.strip(), 0)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES, axis_types=types)


def _parse(spec: str, device_count: int) -> dict[str, int]:
    if spec == "auto":
        return {"fsdp": device_count}
    sizes: dict[str, int] = {}
    for part in spec.split(",") if spec else []:
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals:
            raise UserError(f"--mesh {spec}: {part.strip()!r} is no axis with a size: {_EXAMPLE}")
        if axis not in MESH_AXES:
            raise UserError(f"--mesh {spec}: there is no axis {axis!r}: choose among {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise UserError(f"--mesh {spec}: {axis} is given twice: give it once")
        if not (size.isascii() and size.isdecimal() and int(size) > 0):
            raise UserError(f"--mesh {spec}: {size!r} is no size of {axis}: give a number above 0")
        sizes[axis] = int(size)
    return sizes


def describe_mesh(mesh: Mesh | AbstractMesh, kind: str = "") -> str:
    """`data=2 x fsdp=4 (8 devices: cpu)`.

    Args:
      kind: of the devices, where the mesh has none; empty for what the mesh says.
    """
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = kind or (mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else "")
    count = f"{mesh.size} devices" if axes else "one device"
    kind = (f": {kind}" if axes else f" ({kind})") if kind else ""
    return f"{axes} ({count}{kind})" if axes else f"{count}{kind}"


def current_mesh() -> Mesh:
    """The mesh entered with `jax.set_mesh`, or one of the default device. Not for use under `jit`."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh
