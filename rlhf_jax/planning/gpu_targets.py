"""NVIDIA GPUs as XLA's compiler wants them described, so that it compiles for one that is not there.

Figures of `xla/backends/gpu/target_config/specs` in https://github.com/openxla/xla; a plan needs those that
shape a program (memory, shared memory, cores, capability), and no more of them stand here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """One kind of GPU.

    Attributes:
      description: what `jax.Device.device_kind` is then.
      compute_capability: major and minor.
      cores: streaming multiprocessors.
      fpus: of each.
      memory_bytes: of the device.
      memory_bandwidth: bytes a second.
      cache_bytes: of the second level.
      clock_ghz: of the multiprocessors.
      shared_bytes: of each multiprocessor; a block may ask for 1,024 fewer.
    """

    description: str
    compute_capability: tuple[int, int]
    cores: int
    fpus: int
    memory_bytes: int
    memory_bandwidth: int
    cache_bytes: int
    clock_ghz: float
    shared_bytes: int = 233_472

    def to_text(self) -> str:
        """XLA's `GpuTargetConfigProto`, in the text form of protocol buffers."""
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block_optin: {self.shared_bytes - 1024}
              core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} memory_bandwidth: {self.memory_bandwidth}
              l2_cache_size: {self.cache_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.description}"
        """


GPU_TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        64,
        85_100_068_864,
        2_039_040_000_000,
        41_943_040,
        1.41,
        shared_bytes=167_936,
    ),
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98
    ),
    "h200": GpuTarget(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98
    ),
    "b200": GpuTarget(
        "NVIDIA B200", (10, 0), 148, 128, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965
    ),
    "gb200": GpuTarget(
        "NVIDIA GB200", (10, 0), 152, 128, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062
    ),
}
