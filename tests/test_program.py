"""What is read from HLO text: against programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clip_jax import program, sharding


def _compiled(f, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(f).lower(*arrays).compile()


def _flops(f, *shapes):
  text = _compiled(f, *shapes).as_text()
  computations, entry = program._parse(text)
  runs = program._runs(computations, entry)
  return sum(runs.get(name, 0) * program._flops(c) for name, c in computations.items())


def test_matrix_products_by_hand():
  assert _flops(lambda a, b: a @ b, (32, 48), (48, 64)) == 2 * 32 * 48 * 64
  assert _flops(jax.vmap(jnp.matmul), (5, 32, 48), (5, 48, 64)) == 5 * 2 * 32 * 48 * 64


def _convolution(strides, padding):
  return lambda x, k: jax.lax.conv_general_dilated(
    x, k, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_convolutions_count_no_padding():
  """3x3 over 8x8 with padding 1: of 3 x 8 positions along an axis, 2 are outside."""
  same = _flops(_convolution((1, 1), [(1, 1), (1, 1)]), (2, 8, 8, 3), (3, 3, 3, 5))
  assert same == 2 * 2 * 5 * 3 * 22 * 22
  strided = _flops(_convolution((2, 2), [(0, 0), (0, 0)]), (2, 8, 8, 3), (2, 2, 3, 5))
  assert strided == 2 * 2 * 5 * 3 * 8 * 8


def test_a_dilated_window_that_stands_for_a_batch():
  """As a TPU writes a batched product: one position in each dilated axis meets an input."""
  line = (
    "  %c = f32[128,12,197,197]{2,3,1,0} convolution(%a, %b), window={size=128x12 stride=127x11 "
    "lhs_dilate=128x12}, dim_labels=0b1f_0o1i->01bf"
  )
  computation = program._Computation()
  for text in (
    "  %a = bf16[128,197,12,64]{3,2,1,0} parameter(0)",
    "  %b = bf16[128,197,12,64]{3,2,1,0} parameter(1)",
    line,
  ):
    instruction = program._instruction(text)
    computation[instruction.name] = instruction
  assert program._flops(computation) == 2 * 128 * 12 * 197 * 197 * 64


def test_loops_run_as_often_as_they_say():
  def seven(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  def nested(x, w):
    return jax.lax.scan(lambda x, _: (seven(x, w), None), x, length=3)[0]

  assert _flops(seven, (32, 32), (32, 32)) == 7 * 2 * 32**3
  assert _flops(nested, (32, 32), (32, 32)) == 21 * 2 * 32**3
  assert program.work(_compiled(nested, (32, 32), (32, 32)).as_text()).loops == 21


def test_a_condition_says_the_trips_where_the_loop_does_not():
  """As a TPU's program does."""
  text = """HloModule m

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%i, %d)
}

%condition (p: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %a = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[4,4]{1,0}) while(%a), condition=%condition, body=%body
}
"""
  work = program.work(text)
  assert work.loops == 12
  assert work.hbm_bytes == 12 * 3 * 64
  assert work.collectives == ()


def _collectives(f, *shapes, axes=8):
  mesh = sharding.make_mesh()
  rows = sharding.batch_sharding(mesh)
  mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
  found = program.work(jax.jit(mapped).lower(*arrays).compile().as_text()).collectives
  return {c.kind: (c.count, c.bytes) for c in found}


@pytest.mark.parametrize(
  ("f", "expected"),
  [
    (lambda x: jax.lax.all_gather(x, "data", tiled=True), {"all-gather": (1, 7 * 400)}),
    (lambda x: jax.lax.psum(x, "data"), {"all-reduce": (1, 700)}),
    (
      lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
      {"collective-permute": (1, 400)},
    ),
    (
      lambda x: jax.lax.scan(lambda c, _: (jax.lax.pmean(c, "data") * 1.5, None), x, length=5)[0],
      {"all-reduce": (5, 5 * 700)},
    ),
    (lambda x: x * 2, {}),
  ],
)
def test_collectives_by_hand(f, expected):
  """[8, 100] float32 on 8 devices: 400 bytes each."""
  assert _collectives(f, (8, 100)) == expected


def test_steps_of_one_collective_count_once():
  """A TPU interleaves a collective with other work, in steps that bear its channel."""
  text = """HloModule m

%step (p: f32[16]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %one = f32[64]{0} fusion(%a), kind=kCustom, calls=%step
  ROOT %two = f32[64]{0} all-gather(%a), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
  assert program.work(text).collectives == (program.Collective("all-gather", 1, 3 * 64),)


def test_slices_of_a_stack_are_read_not_the_stack():
  """A scan over [50, 32, 32] weights reads each once: not the stack 50 times."""

  def f(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  bytes_ = program.work(_compiled(f, (32, 32), (50, 32, 32)).as_text()).hbm_bytes
  assert 50 * 4096 * 3 <= bytes_ < 50 * 4096 * 10
