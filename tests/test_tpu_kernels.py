"""The cycles of kernels: read from a schedule, and found by the TPU compiler."""

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.compilers import estimate, kernels, schedule, topologies
from mdt_jax.compilers.kernels import Work
from mdt_jax.models import attention_kernel, norm_kernels

# Three bundles before the grid's loop; in it, a guarded region with a loop of 5 turns, one bundle,
# and a loop of 7 turns.
SCHEDULE = """
LB: loop body
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1   :  { %s2 = smov 0 }
   0x2   :  { %s3 = smov 0 }
   0x3 LB: > { %s4 = sphi %s1, %s9 ;;  %p7_p1 = scmp.ne.s32.totalorder %s4, 0 }
   0x4   : > { %12 = sbr.rel (%p7_p1) target = $region9 }
   0x5   : > { %v1 = vld [vmem:[#allocation2]] /* comments
 may be of several lines */ }
   0x6 LB: >> { %s5 = sphi %s1, %s6 }
   0x7   : >> { %p8 = scmp.ge.s32.totalorder %s6, 5 /* loop exit test */ }
   0x8   : >> { %13 = sbr.rel (!%p8) target = $region11 }
   0x9 PF: > { %v2 = vadd.f32 %v1, %v1 } /* Start/End empty region 9 */
   0xa LB: >> { %s5 = sphi %s1, %s6 }
   0xb   : >> { %p9 = scmp.ge.s32.totalorder %s6, 7 /* loop exit test */ }
   0xc   : >> { %14 = sbr.rel (!%p9) target = $region12 }
   0xd   : > { %v3 = vadd.f32 %v1, %v1 }
   0xe   : > { %p10 = scmp.ge.s32.totalorder %s9, 10 /* loop exit test */ }
   0xf   :  { %15 = sbr.rel (!%p10) target = $region13 }
"""


def test_bundles_count_as_often_as_they_run():
    # 4 outside; 8 turns of 2 + 1 + 3·7 + 2; 1 + 3·5 guarded, once for each of 2 outer turns.
    assert schedule.cycles(SCHEDULE, (2, 4)) == 4 + 8 * (2 + 1 + 3 * 7 + 2) + 2 * (1 + 3 * 5)


def test_a_core_that_shares_the_grid_does_its_part():
    half = schedule.cycles(SCHEDULE, (2, 4), steps=4)
    assert half == 4 + 4 * (2 + 1 + 3 * 7 + 2) + 1 * (1 + 3 * 5)


def test_what_is_not_guarded_by_a_constant_counts_in_every_turn():
    other = SCHEDULE.replace("%p7_p1 = scmp.ne.s32.totalorder %s4, 0", "%p7_p1 = por %p2, %p3")
    assert schedule.cycles(other, (2, 4)) == 4 + 8 * (2 + 1 + 3 * 7 + 2 + 1 + 3 * 5)


def test_a_guarded_body_counts_in_every_turn():
    whole = SCHEDULE.replace("target = $region9", "target = $region99").replace(
        "%v3 = vadd.f32 %v1, %v1 }", "%v3 = vadd.f32 %v1, %v1 } /* End region 99 */"
    )
    assert schedule.cycles(whole, (2, 4)) == 4 + 8 * (2 + 1 + 3 * 7 + 2 + 1 + 3 * 5)


def test_no_schedule_is_said():
    with pytest.raises(ValueError, match="has no bundles"):
        schedule.cycles("nothing", (1,))


def both_kernels(qkv, bias, strips, x, scale):
    out = attention_kernel.attention(qkv, bias, strips, (None,), (256,))
    return out, norm_kernels.modulated_norm(x, scale, scale, (256,), 1e-6)[0]


def arguments(batch=4, heads=2, width=64):
    shapes = (
        ((batch, 3, heads, width, 256), jnp.bfloat16),
        ((3, heads, width), jnp.float32),
        ((heads, 16, 31 * 16), jnp.float32),
        ((batch, 256, 128), jnp.bfloat16),
        ((batch, 1, 128), jnp.bfloat16),
    )
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def test_a_programs_kernels_are_found_once_each():
    def twice(*args):
        return both_kernels(*args), jax.checkpoint(both_kernels)(*args)

    found = kernels.find_kernels(jax.jit(twice), arguments())
    assert [k.name for k in found] == ["attention_forward", "norm_kernel"]
    attention, norm = found
    assert attention.outputs[0] == ("bf16", (4, 2, 64, 256))
    assert attention.flops == 4 * 2 * 2 * 2 * 256 * 256 * 64 and norm.flops == 0
    assert (attention.grid, attention.parallel) == ((2, 4), (True, False))
    assert (attention.steps(cores=1), attention.steps(cores=2)) == (8, 4)
    assert norm.bytes == 2 * 4 * 256 * 128 * 2 + 2 * 4 * 128 * 2


def test_a_kernel_counts_in_the_program_as_often_as_it_runs():
    text = """HloModule m

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %k.1 = bf16[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attn/attention_forward/pallas_call"}
  ROOT %k.2 = bf16[4,8]{1,0} custom-call(%k.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/norm_kernel/pallas_call"}
}
"""  # noqa: E501
    known = {("attention_forward", (("bf16", (4, 8)),)): Work(cycles=100, flops=7)}
    found = estimate.estimate_program(text, kernels=known)
    assert (found.cycles, found.by_kind["attention"], found.flops) == (100, 100, 7)
    assert found.not_estimated == {"custom-call tpu_custom_call": 64}  # the one not known


@pytest.mark.tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_the_compilers_schedules(chip):
    chip = topologies.CHIPS[chip]
    found = kernels.find_kernels(jax.jit(both_kernels), arguments())
    attention, norm = (kernels.kernel_work(found, chip)[k.name, k.outputs] for k in found)
    # Attention takes more than the matrix units' floor (heads are padded to 128), but not far more;
    # the norm takes at least its time at the memory's bandwidth.
    floor = 2 * attention.flops / (2 * chip.mxu_macs)
    assert floor < attention.cycles < 10 * floor
    assert norm.cycles >= found[1].bytes / chip.hbm_bandwidth * chip.clock - 1


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("dtype", "heads", "width", "kept"),
    [(jnp.float32, 16, 72, 179), (jnp.bfloat16, 15, 72, 179), (jnp.bfloat16, 16, 72, 240)],
)
def test_the_kernels_fit_a_v4_core(dtype, heads, width, kept):
    def gradients(qkv, bias, strips, ids):
        attend = lambda *a: attention_kernel.attention(*a, (ids,), (kept,))  # noqa: E731
        out, pull = jax.vjp(attend, qkv, bias, strips)
        return pull(out)

    shapes = (
        ((2, 3, heads, width, 256), dtype),
        ((3, heads, width), jnp.float32),
        ((heads, 16, 31 * 16), jnp.float32),
        ((2, kept), jnp.int32),
    )
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    found = kernels.find_kernels(jax.jit(gradients), arguments)
    work = kernels.kernel_work(found, topologies.CHIPS["v4"])
    assert {name for name, _ in work} == {"attention_forward_masked", "attention_backward_masked"}
