"""Programs read: operations as traced, loops, memory and communication of compiled text, rooflines."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.accelerator_specs import CHIPS, chip_of, roofline
from rlhf_jax.planning.hlo_analysis import HloModule, arrays_of, matmul_flops, memory_traffic
from rlhf_jax.planning.hlo_collectives import by_kind, collectives
from rlhf_jax.planning.topologies import topology_devices


def traced(function, *shapes):
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def test_operations_of_matrix_products():
    assert matmul_flops(traced(jnp.matmul, (2, 3), (3, 5))) == 2 * 2 * 3 * 5
    batched = traced(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (7, 2, 3), (7, 4, 3))
    assert matmul_flops(batched) == 2 * 7 * 2 * 3 * 4


def layers(weights, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0].sum()


def test_operations_of_loops_branches_and_gradients():
    one = 2 * 4 * 8 * 8
    shapes = (5, 8, 8), (4, 8)
    assert matmul_flops(traced(layers, *shapes)) == 5 * one
    assert matmul_flops(traced(jax.grad(layers, argnums=(0, 1)), *shapes)) == 3 * 5 * one
    remat = jax.grad(lambda w, x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w)))(x).sum(), argnums=(0, 1))
    assert matmul_flops(traced(remat, (8, 8), (4, 8))) == 4 * one  # forward, again, and twice backward

    def loop(w, x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    assert matmul_flops(traced(loop, (8, 8), (4, 8)), while_trips=9) == 9 * one
    branch = traced(lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w), (8, 8), (4, 8))
    assert matmul_flops(branch) == 2 * one


# In the TPU compiler's spelling: memory spaces, loops that tell their rounds in the condition only, a gather
# that starts in one fusion and ends in another.
TEXT = """HloModule m
%start (p.1: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4] {'a'}
  ROOT %c.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}
%end (p.2: bf16[4,8], p.3: bf16[16,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %p.3 = bf16[16,8]{1,0} parameter(1)
  ROOT %ag.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4] {'a'}
}
%slice (p.4: f32[10,4,8], p.5: s32[]) -> f32[1,4,8] {
  %p.4 = f32[10,4,8]{2,1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,4,8]{2,1,0} dynamic-slice(%p.4, %p.5, %zero, %zero), dynamic_slice_sizes={1,4,8}
}
%body (s: (s32[], f32[10,4,8], bf16[4,8])) -> (s32[], f32[10,4,8], bf16[4,8]) {
  %s = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = f32[10,4,8]{2,1,0} get-tuple-element(%s), index=1
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=2
  %part = f32[1,4,8]{2,1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice
  %begin = (bf16[4,8]{1,0:S(1)}, bf16[16,8]{1,0:S(1)}) fusion(%x), kind=kCustom, calls=%start
  %y = bf16[16,8]{1,0:S(1)} get-tuple-element(%begin), index=1
  %done = bf16[16,8]{1,0:S(1)} fusion(%x, %y), kind=kCustom, calls=%end
  ROOT %t = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) tuple(%i, %w, %x)
}
%condition (s.1: (s32[], f32[10,4,8], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %s.1 = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}
%forever (s.2: (s32[], f32[10,4,8], bf16[4,8])) -> pred[] {
  %s.2 = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  ROOT %ne = pred[] compare(%i.2, %i.2), direction=NE
}
ENTRY %main (a: f32[10,4,8], b: bf16[4,8]) -> f32[10,4,8] {
  %a = f32[10,4,8]{2,1,0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %n = s32[] constant(0)
  %init = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) tuple(%n, %a, %b)
  %loop.1 = (s32[], f32[10,4,8]{2,1,0}, bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %out.1 = f32[10,4,8]{2,1,0} get-tuple-element(%loop.1), index=1
  ROOT %copied = f32[10,4,8]{2,1,0} copy(%out.1)
}
"""


def test_loops_run_as_often_as_their_condition_says():
    assert [i.times for i in HloModule(TEXT).walk() if " dynamic-slice(" in i.line] == [10]
    unknown = TEXT.replace("condition=%condition", "condition=%forever")
    assert [i.times for i in HloModule(unknown).walk(3) if " dynamic-slice(" in i.line] == [3]


def test_a_gather_that_starts_and_ends_counts_once():
    assert by_kind(collectives(TEXT)) == {"all-gather": (10, 10 * 16 * 8 * 2 * 3 / 4)}


# In the GPU compiler's spelling: what runs beside other work gives what goes in and what comes out, but for
# an all-reduce. On each of 8 devices.
STARTED = """HloModule m
ENTRY %main (a: bf16[64,4]) -> bf16[8,4] {
  %a = bf16[64,4]{1,0} parameter(0)
  %begin = START, channel_id=3, replica_groups=mesh['x'=8,'y'=1] {'x'}
  ROOT %end = bf16[8,4]{1,0} copy(%begin)
}
"""
ARRAY = 64 * 4 * 2


@pytest.mark.parametrize(
    ("start", "received"),
    [
        ("((bf16[64,4]{1,0}), bf16[8,4]{1,0}) reduce-scatter-start(%a)", 7 / 8 * ARRAY),
        (
            "((bf16[64,4]{1,0}, bf16[64,8]{1,0}), (bf16[8,4]{1,0}, /*index=5*/bf16[8,8]{1,0})) "
            "reduce-scatter-start(%a, %a)",
            7 / 8 * 3 * ARRAY,
        ),
        ("bf16[8,4]{1,0} reduce-scatter(%a)", 7 / 8 * ARRAY),
        ("(bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%a)", 7 / 8 * ARRAY),
        ("bf16[64,4]{1,0} all-reduce-start(%a)", 2 * 7 / 8 * ARRAY),
        ("((bf16[64,4]{1,0}), bf16[64,4]{1,0}) all-to-all-start(%a)", 7 / 8 * ARRAY),
    ],
)
def test_bytes_of_what_starts_beside_other_work(start, received):
    [(count, moved)] = by_kind(collectives(STARTED.replace("START", start))).values()
    assert (count, moved) == (1, received)


def test_memory_that_is_moved():
    whole = 10 * 4 * 8 * 4
    # Every round reads a slice of the stack and the counter, and compares that with its limit; what lies in
    # S(1) is on the chip. At the end the stack is copied.
    rounds = 10 * (4 * 8 * 4 + 4 + 4 + 4 + 1)
    assert memory_traffic(HloModule(TEXT)) == rounds + 2 * whole


def test_arrays_of_a_type():
    first, second = arrays_of("(bf16[2,4]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[3])")
    assert (first.shape, first.nbytes, first.in_memory) == ((2, 4), 16, False)
    assert (second.shape, second.nbytes, second.in_memory) == ((3,), 3, True)


def test_chips():
    names = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "NVIDIA H100 80GB HBM3": "H100 SXM"}
    for kind, name in names.items():
        chip = chip_of(kind)
        assert chip is not None
        assert chip.name == name
    assert chip_of("cpu") is None
    assert all(chip.source.startswith("https://") for chip in CHIPS)
    least = roofline(CHIPS[0], flops=275e12, memory_bytes=2400e9, sent_bytes=150e9)
    assert least == {"compute": 1.0, "memory": 2.0, "communication": 0.5}


def test_a_slice_that_is_not_understood():
    with pytest.raises(UserError, match=r"--topology 'v5e-64' is not understood: .* such as v5e:8x8"):
        topology_devices("v5e-64")


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[tpu-plan\]'"):
        topology_devices("v5e:8x8")
