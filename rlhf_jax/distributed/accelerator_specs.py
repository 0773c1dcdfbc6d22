"""Accelerator peaks by their makers' public figures: the roofs of every roofline here."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: for people.
      device_kind: what `jax.Device.device_kind` begins with.
      peak_flops: of dense bfloat16 matrix products a second.
      memory_bytes: what a program may use; of TPUs, what their compiler allows.
      memory_bandwidth: of the device's own memory, bytes a second.
      link_bandwidth: of all links to other devices together, in one direction, bytes a second.
      source: where the figures stand.
    """

    name: str
    device_kind: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"

# A TPU's documents give the links of both directions together; here is half of that. Two devices of TPU7x
# make one chip, and so do two of v4 where its cores are not fused.
CHIPS = (
    Chip("TPU v4", "TPU v4", 275e12, 31.25 * GIB, 1200e9, 300e9, f"{_TPU}/v4"),
    Chip("TPU v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, f"{_TPU}/v5e"),
    Chip("TPU v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, f"{_TPU}/v5p"),
    Chip("TPU v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1638e9, 400e9, f"{_TPU}/v6e"),
    Chip("half a TPU7x", "TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 600e9 / 2, f"{_TPU}/tpu7x"),
    Chip("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9, f"{_NVIDIA}/a100"),
    Chip("H100 SXM", "NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, f"{_NVIDIA}/h100"),
    Chip("H200 SXM", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, f"{_NVIDIA}/h200"),
    Chip("B200 SXM", "NVIDIA B200", 2250e12, 180e9, 8000e9, 900e9, f"{_NVIDIA}/dgx-b200"),
    Chip("half a GB200", "NVIDIA GB200", 2500e12, 186e9, 8000e9, 900e9, f"{_NVIDIA}/gb200-nvl72"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The figures of a kind of device; None where they are not known, as of CPUs."""
    fitting = [chip for chip in CHIPS if device_kind.startswith(chip.device_kind)]
    return max(fitting, key=lambda chip: len(chip.device_kind), default=None)


def roofline(chip: Chip, *, flops: float, memory_bytes: float, sent_bytes: float) -> dict[str, float]:
    """Seconds that computing, reading and writing memory, and communicating take at the chip's best.

    A step takes the longest of them if all overlap, their sum if none do, and more than that in practice.
    """
    return {
        "compute": flops / chip.peak_flops,
        "memory": memory_bytes / chip.memory_bandwidth,
        "communication": sent_bytes / chip.link_bandwidth,
    }
