"""What is read from HLO text: against programs whose work is known."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import collectives, hlo, preflight, program, sharding
from clip_jax import config as c

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: make install-tpu"
)


def _compiled(f, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(f).lower(*arrays).compile({"xla_cpu_use_fusion_emitters": True})  # XLA's default


def _flops(f, *shapes):
  return program.flops(hlo.parse(_compiled(f, *shapes).as_text()))


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
  computation = hlo.Computation()
  for text in (
    "  %a = bf16[128,197,12,64]{3,2,1,0} parameter(0)",
    "  %b = bf16[128,197,12,64]{3,2,1,0} parameter(1)",
    line,
  ):
    instruction = hlo.instruction_of(text)
    computation[instruction.name] = instruction
  assert program._flops(computation) == 2 * 128 * 12 * 197 * 197 * 64


def test_a_matrix_product_that_a_gpu_leaves_to_a_library():
  line = (
    '  %g = (f32[32,64]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"'
    ', backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
  )
  computation = hlo.Computation()
  for text in (
    "  %a = f32[32,48]{1,0} parameter(0)", "  %b = f32[48,64]{1,0} parameter(1)", line,
  ):  # fmt: skip
    computation[hlo.instruction_of(text).name] = hlo.instruction_of(text)
  assert program._flops(computation) == 2 * 32 * 48 * 64


def test_loops_run_as_often_as_they_say():
  def seven(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  def nested(x, w):
    return jax.lax.scan(lambda x, _: (seven(x, w), None), x, length=3)[0]

  assert _flops(seven, (32, 32), (32, 32)) == 7 * 2 * 32**3
  assert _flops(nested, (32, 32), (32, 32)) == 21 * 2 * 32**3
  assert program.work(_compiled(nested, (32, 32), (32, 32)).as_text()).loops == 21


LOOP = """HloModule m

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %d)
}

%less (left: s32[], right: s32[]) -> pred[] {
  %left = s32[] parameter(0)
  %right = s32[] parameter(1)
  ROOT %compare = pred[] compare(%left, %right), direction=LT
}

%condition (p: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %fused = pred[]{:T(512)} fusion(%i.1, %limit), kind=kLoop, calls=%less
}

ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[4,4]{1,0}) tuple(%copied, %a)
  ROOT %w = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("start", "step", "trips"), [(0, 1, 12), (0, 2, 6), (3, 2, 5), (12, 1, 0)])
def test_a_counter_says_the_trips_where_xla_does_not(start, step, trips):
  """As in a TPU's program: a loop that XLA unrolled by two counts by two."""
  text = LOOP.replace("START", str(start)).replace("STEP", str(step))
  work = program.work(text)
  assert work.loops == trips
  assert work.hbm_bytes == trips * (3 * 64 + 3 * 4) + 2 * 4
  assert work.collectives == ()


def test_a_loop_whose_trips_are_unknown_is_an_error():
  text = LOOP.replace("START", "0").replace("STEP", "1").replace("copy(%zero)", "parameter(1)")
  with pytest.raises(hlo.HloError, match="w: how often this loop runs does not follow"):
    program.work(text)


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


GROUPS = [
  ("{{0,1},{2,3}}", 2),
  ("{{0,1,2,3,4,5,6,7}}", 8),
  ("[2,4]<=[8]", 4),
  ("[4,2]<=[2,4]T(1,0)", 2),
  ("mesh['axis_0'=16,'axis_1'=1] {'axis_0'}", 16),
  ("mesh['axis_0'=4,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 8),
  ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", 4),
  ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}", 4),
  ("mesh['axis_0'=16] {}", 1),
  ("{}", 12),
]


@pytest.mark.parametrize(("groups", "devices"), GROUPS)
def test_every_way_to_name_the_devices(groups, devices):
  """XLA's three lists of replica groups; libtpu 0.0.42 writes the first and the last of them."""
  text = f"""HloModule m, num_partitions=6, replica_count=2

ENTRY %main (a: f32[16]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  ROOT %g = f32[64]{{0}} all-gather(%a), channel_id=3, replica_groups={groups}, dimensions={{0}}
}}
"""
  found = program.work(text).collectives
  expected = (collectives.Collective("all-gather", 1, (devices - 1) * 64),)
  assert found == (expected if devices > 1 else ())


@pytest.mark.parametrize("groups", [", replica_groups=ring[4]{0}", ""])
def test_devices_named_in_another_way_are_an_error(groups):
  text = f"""HloModule m

ENTRY %main (a: f32[16]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  ROOT %g = f32[64]{{0}} all-gather(%a), channel_id=3{groups}
}}
"""
  with pytest.raises(hlo.HloError, match="g: which devices take part is not understood: "):
    program.work(text)


def test_text_of_libtpu():
  """Two gathers of one channel, each in steps; a loop that counts by two; sums of two dtypes."""
  path = pathlib.Path(__file__).parent / "golden" / "libtpu_hlo.txt"
  found = {k.kind: (k.count, k.bytes) for k in collectives.collectives(hlo.parse(path.read_text()))}
  embeddings, ids, projection = 128 * 256 * 4, 128 * 4, 32 * 256 * 2
  sums = 2 * 512 * 256 * 4 + 1024 * 512 * 4, 2 * 512 * 256 * 2 + 1024 * 512 * 4
  assert found == {
    "all-gather": (4, 15 * (2 * embeddings + ids + projection)),
    "all-reduce": (1, 15 / 16 * sum(sums)),
    "collective-permute": (16, 16 * 192 * 32 * 2),
  }


B = P(sharding.BATCH_AXES)


def _on(mesh, spec, *shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def _mapped(f, mesh, spec):
  return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=B, check_vma=False)


def _data_parallel(mesh):
  """Two weights of 1 MiB; their gradients are summed."""
  step = jax.grad(lambda w, x: jnp.square(jnp.tanh(x @ w[0]) @ w[1]).sum())
  weight = _on(mesh, P(), 512, 512)
  return jax.jit(step).lower([weight, weight], _on(mesh, B, 2048, 512))


def _fully_sharded(mesh):
  """Four weights of 4 MiB, gathered once, in bfloat16; their gradients are scattered."""
  lies = NamedSharding(mesh, P("fsdp", None))

  def loss(weights, x):
    for w in weights:
      x = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, B))
    return x.sum()

  def step(weights, x):
    return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights, x))

  weights = [_on(mesh, P("fsdp", None), 1024, 1024)] * 4
  return jax.jit(step, out_shardings=[lies] * 4).lower(weights, _on(mesh, B, 1024, 1024))


def _two_gathers(mesh):
  """As the loss has them, in bfloat16 here: [1024, 512] of each side."""
  gather = functools.partial(jax.lax.all_gather, axis_name=sharding.BATCH_AXES, tiled=True)
  f = _mapped(lambda a, b: (gather(a) @ gather(b).T).sum(1), mesh, (B, B))
  return jax.jit(f).lower(_on(mesh, B, 1024, 512), _on(mesh, B, 1024, 512))


def _ring(mesh):
  """As many hops as there are devices, of 512 KiB each."""
  hops = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

  def local(x):
    hop = lambda x, _: (jax.lax.ppermute(x, sharding.BATCH_AXES, hops) * 2, None)  # noqa: E731
    return jax.lax.scan(hop, x, length=mesh.size)[0]

  return jax.jit(_mapped(local, mesh, B)).lower(_on(mesh, B, 256 * mesh.size, 512))


MIB = 2**20
ON_TPUS = [
  (_data_parallel, 1, 1, {"all-reduce": (1, 2 * 2 * MIB * 3 // 4)}),
  (
    _fully_sharded, 4, 1,
    {"all-gather": (4, 4 * 2 * MIB * 3 // 4), "reduce-scatter": (4, 4 * 4 * MIB * 3 // 4)},
  ),
  (_two_gathers, 1, 1, {"all-gather": (2, 2 * 3 * MIB // 4)}),
  (_ring, 1, 1, {"collective-permute": (4, 4 * MIB // 2)}),
  # two slices: sums are scattered within each, a quarter of them crosses and comes back
  (
    _data_parallel, 1, 2,
    {
      "all-gather": (2, 2 * MIB * 3 // 4), "reduce-scatter": (2, 2 * MIB * 3 // 4),
      "between slices": (2, 2 * MIB // 4),
    },
  ),
  (_ring, 1, 2, {"collective-permute": (8, 8 * MIB // 2), "between slices": (8, 8 * MIB // 2)}),
]  # fmt: skip


@needs_libtpu
@pytest.mark.parametrize(("program_of", "fsdp", "slices", "expected"), ON_TPUS)
def test_collectives_of_tpu_programs_by_hand(program_of, fsdp, slices, expected):
  mesh = sharding.make_mesh(c.Mesh(fsdp=fsdp), preflight.devices_of("v5e:2x2", slices))
  text = program_of(mesh).compile().as_text()
  found = {k.kind: (k.count, k.bytes) for k in program.work(text).collectives}
  assert found == expected


def test_slices_of_a_stack_are_read_not_the_stack():
  """A scan over [50, 32, 32] weights reads each once: not the stack 50 times."""

  def f(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  bytes_ = program.work(_compiled(f, (32, 32), (50, 32, 32)).as_text()).hbm_bytes
  assert 50 * 4096 * 3 <= bytes_ < 50 * 4096 * 10


def test_traffic_is_what_xla_counts():
  """Of a program without loops, all in main memory."""

  def f(x, w):
    y = jax.nn.softmax(jnp.tanh(x @ w) @ w.T) @ x.T
    return jnp.sort(y, axis=1)[:, :8], jax.lax.dynamic_update_slice(x, y[:4, :4], (2, 3))

  compiled = _compiled(jax.grad(lambda *a: sum(z.sum() for z in f(*a)), (0, 1)), (96, 64), (64, 32))
  counted = compiled.cost_analysis()["bytes accessed"]
  assert program.work(compiled.as_text()).hbm_bytes == pytest.approx(counted, rel=0.02)


TPU_LINES = """HloModule m

%updates (p0: f32[4,128,128], p1: f32[1,128,128]) -> (f32[4,128,128], f32[128]) {
  %p0 = f32[4,128,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[1,128,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[] constant(1)
  %row = f32[128]{0:T(128)} reduce(%p1, %i), dimensions={0,1}
  %u = f32[4,128,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %i, %i, %i)
  ROOT %t = (f32[4,128,128]{2,1,0:T(8,128)}, f32[128]{0:T(128)}) tuple(%u, %row)
}

ENTRY %main (a: f32[4,128,128]) -> f32[4,128,128] {
  %a = f32[4,128,128]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[65,65]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[1,128,128]{2,1,0:T(8,128)S(1)} parameter(2)
  %d = f32[4,128,128]{2,1,0:T(8,128)S(1)} parameter(3)
  LINE
}
"""
BIG, PLANE, TILED = 4 * 128 * 128 * 4, 128 * 128 * 4, 72 * 128 * 2
ON_LINES = [
  # to vector memory and back: one side each is in main memory
  ("%x = (f32[4,128,128]{2,1,0:T(8,128)S(1)}, f32[4,128,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) "
   "copy-start(%a)", BIG),
  # a slice of the planes
  ("%x = ((f32[4,128,128]{2,1,0:T(8,128)}), f32[1,128,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
   "slice-start(%a), slice={[0:1], [0:128], [0:128]}", PLANE),
  ("%x = f32[1,128,128]{2,1,0:T(8,128)S(1)} slice(%a), slice={[0:1], [0:128], [0:128]}", PLANE),
  # tiles of 8 x 128 are read and written whole
  ("%x = bf16[65,65]{1,0:T(8,128)(2,1)} negate(%b)", 2 * TILED),
  ("%x = bf16[65,65]{0,1:T(8,128)(2,1)S(1)} negate(%b)", TILED),
  # pieces that lie side by side are one array
  ('%x = bf16[65,65]{1,0:T(8,128)(2,1)} custom-call(%b), custom_call_target="ConcatBitcast"', 0),
  # an update in place and a second result
  ("%x = (f32[4,128,128]{2,1,0:T(8,128)}, f32[128]{0:T(128)}) fusion(%a, %c), kind=kLoop, "
   "calls=%updates", PLANE + 512),
  ("%x = (f32[4,128,128]{2,1,0:T(8,128)S(1)}, f32[128]{0:T(128)}) fusion(%d, %c), kind=kLoop, "
   "calls=%updates", 512),
]  # fmt: skip


@pytest.mark.parametrize(("line", "moved"), ON_LINES)
def test_traffic_of_a_tpus_main_memory_by_hand(line, moved):
  assert program.work(TPU_LINES.replace("LINE", line)).hbm_bytes == moved


def test_a_gather_in_steps_reads_and_writes_once():
  """In the kept text: the steps of the two gathers, one of them from vector memory."""
  path = pathlib.Path(__file__).parent / "golden" / "libtpu_hlo.txt"
  module = hlo.parse(path.read_text())
  entry = module.computations["main.152_spmd"]
  moved = {
    name: sum(program._moved(entry[name], entry, module.computations))
    for name in entry
    if name.startswith("async-collective")
  }
  assert moved == {
    "async-collective-start.3": 128 * 256 * 4,
    "async-collective-done.3": 0,
    "async-collective-start.4": 0,
    "async-collective-done.4": 0,
  }
