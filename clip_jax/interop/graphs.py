"""The computation itself, handed on: ONNX, StableHLO and TensorFlow's SavedModel.

Each folder holds three graphs in float32 for any batch: `image_encoder`, `text_encoder` and `clip`
(both, with the logits), and a graphs.json that names their inputs and outputs. A graph is a program
that its reader runs, so the sha256 of each lies beside it, for `sha256sum --check`. ONNX takes
pixels as [B, 3, R, R] and tokens as int64, as PyTorch's exports do; the other two [B, R, R, 3] and
int32.
"""

import dataclasses
import hashlib
import importlib
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from clip_jax import inference
from clip_jax.interop import onnx_edits, weights, writers
from clip_jax.interop.architecture import WeightsError
from clip_jax.models.clip import CLIP

FORMATS = ("onnx", "stablehlo", "savedmodel")
PLATFORMS = ("cpu", "cuda", "tpu")  # of StableHLO and SavedModel
_ONE_FILE_BYTES = 2**31 - 2**24  # an .onnx file holds less than 2 GiB, names and nodes included
_PROGRAMS = {"onnx": "*.onnx", "stablehlo": "*.stablehlo", "savedmodel": "saved_model.pb"}
_NEEDS = {
  "onnx": ("jax2onnx", "pip install -e '.[onnx]' && pip install --no-deps jax2onnx"),
  "savedmodel": ("tensorflow", "pip install -e '.[savedmodel]'"),
}


@dataclasses.dataclass(frozen=True)
class Graph:
  """One function of (variables, inputs): `function(variables, *inputs)` gives a tuple."""

  name: str
  function: Callable[..., Any]
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]


def check(format: str) -> None:
  """Raises: WeightsError when what writes this format is not installed, with the command."""
  module, command = _NEEDS.get(format, ("", ""))
  if module and importlib.util.find_spec(module) is None:
    raise WeightsError(f"{format}: {module} is not installed; in the checkout, {command}")


def write(model: inference.Clip, folder: pathlib.Path, format: str) -> None:
  """Writes the three graphs into `folder`, which is there already.

  Raises: WeightsError when the weights hold NaN or infinity.
  """
  weights.finite(model.variables)
  {"onnx": _onnx, "stablehlo": _stablehlo, "savedmodel": _savedmodel}[format](model, folder)
  m = model.config.model
  shapes, integers = _shapes(model, format == "onnx"), "int64" if format == "onnx" else "int32"
  description = {
    "graphs": {g.name: {"inputs": g.inputs, "outputs": g.outputs} for g in graphs(model, False)},
    "pixel_values": f"float32 {shapes['pixel_values']}, normalised",
    "input_ids": f"{integers} {shapes['input_ids']}",
    "image_embeds": f"float32 ['images', {m.embed_dim}], of length 1",
    "text_embeds": f"float32 ['texts', {m.embed_dim}], of length 1",
    "logits_per_image": "float32 ['images', 'texts']; logits_per_text: the same transposed",
    "loss": m.loss,
    "jax": jax.__version__,
  }
  for path in sorted(folder.glob(_PROGRAMS[format])):
    _sidecar(path).write_text(f"{_sha256(path)}  {path.name}\n", encoding="utf-8")
  writers.json_file(folder / "graphs.json", description)


def check_sha256(path: pathlib.Path) -> None:
  """Raises: WeightsError when the file is not the one of which NAME.sha256, beside it, speaks."""
  beside = _sidecar(path)
  if not beside.exists():
    return
  told = beside.read_text(encoding="utf-8", errors="replace").split()[:1]
  if told != [digest := _sha256(path)]:
    raise WeightsError(
      f"{path}: its sha256 is {digest}, which is not what {beside.name} says: it is a program, and "
      "not the one that was exported; get both again"
    )


def _sidecar(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.sha256")


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_stablehlo(path: pathlib.Path) -> jax.export.Exported:
  """A NAME.stablehlo, which is a program: `call` runs it.

  Raises: WeightsError when it is not the file of its sha256, or of another JAX than this one reads.
  """
  check_sha256(path)
  lowest = jax.export.minimum_supported_calling_convention_version
  highest = jax.export.maximum_supported_calling_convention_version
  try:
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    version = exported.calling_convention_version
    reason = (
      ""
      if lowest <= version <= highest
      else (f"its calling convention is {version}, this JAX has {lowest} to {highest}")
    )
  except Exception as error:  # whatever the reader of flatbuffers makes of another format
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
  if reason:
    raise WeightsError(
      f"{path}: jax {jax.__version__} does not read it ({reason}); graphs.json beside it says "
      "which version wrote it: install that one, or export it anew with this"
    )
  return exported


def graphs(model: inference.Clip, channels_first: bool) -> list[Graph]:
  """The three functions, in float32 and without the scan and remat of training."""
  config = dataclasses.replace(
    model.config.model, compute_dtype="float32", residual_dtype="float32", remat="none"
  )

  def image(variables: Any, pixel_values: jax.Array) -> tuple[Any, ...]:
    image_BRR3 = pixel_values.transpose(0, 2, 3, 1) if channels_first else pixel_values
    return (CLIP(config).apply(variables, image_BRR3, method="encode_image"),)

  def text(variables: Any, input_ids: jax.Array) -> tuple[Any, ...]:
    return (CLIP(config).apply(variables, input_ids, method="encode_text"),)

  def both(variables: Any, pixel_values: jax.Array, input_ids: jax.Array) -> tuple[Any, ...]:
    (image_NE,), (text_NE,) = image(variables, pixel_values), text(variables, input_ids)
    logits_NN = jnp.exp(variables["params"]["log_scale"]) * image_NE @ text_NE.T
    if config.loss == "sigmoid":
      logits_NN = logits_NN + variables["params"]["logit_bias"]
    return logits_NN, logits_NN.T, text_NE, image_NE

  pixels, tokens = "pixel_values", "input_ids"
  logits = ("logits_per_image", "logits_per_text")
  return [
    Graph("image_encoder", image, (pixels,), ("image_embeds",)),
    Graph("text_encoder", text, (tokens,), ("text_embeds",)),
    Graph("clip", both, (pixels, tokens), (*logits, "text_embeds", "image_embeds")),
  ]


def _shapes(model: inference.Clip, channels_first: bool) -> dict[str, list[int | str]]:
  m = model.config.model
  side = m.image.resolution
  pixels = [3, side, side] if channels_first else [side, side, 3]
  return {"pixel_values": ["images", *pixels], "input_ids": ["texts", m.text.context_length]}


def _specs(model: inference.Clip, graph: Graph, channels_first: bool) -> list[jax.ShapeDtypeStruct]:
  """The inputs of a graph: two symbolic batches, as images and texts need not be as many."""
  images, texts = jax.export.symbolic_shape("images, texts")
  shapes = _shapes(model, channels_first)
  dtypes = {"pixel_values": jnp.float32, "input_ids": jnp.int32}
  batches = {"pixel_values": images, "input_ids": texts}
  return [
    jax.ShapeDtypeStruct((batches[name], *shapes[name][1:]), dtypes[name]) for name in graph.inputs
  ]


def _onnx(model: inference.Clip, folder: pathlib.Path) -> None:
  # One tells of its plugins for libraries that are not here, the other of shapes it leaves open.
  for name in ("jax2onnx", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  jax2onnx, ir = importlib.import_module("jax2onnx"), importlib.import_module("onnx_ir")
  variables = jax.tree.map(np.asarray, model.variables)
  for graph in graphs(model, channels_first=True):
    specs = _specs(model, graph, channels_first=True)
    closed = jax.make_jaxpr(lambda *inputs, g=graph: g.function(variables, *inputs))(*specs)
    constants = [np.asarray(x) for x in closed.consts]

    def flat(*inputs: Any, c: Any = closed, constants: Any = constants) -> Any:
      outputs = inline(c.jaxpr, constants, inputs)
      return tuple(outputs) if len(outputs) > 1 else outputs[0]

    onnx = jax2onnx.to_onnx(
      flat,
      specs,
      model_name=graph.name,
      opset=18,
      input_names=graph.inputs,
      output_names=graph.outputs,
      return_mode="ir",
    )
    onnx_edits.multiply_by_matrices(ir, onnx)
    onnx_edits.widen_tokens(ir, onnx)
    path = folder / f"{graph.name}.onnx"
    size = sum(value.const_value.nbytes for value in onnx.graph.initializers.values())
    ir.save(onnx, path, external_data=f"{path.name}.data" if size > _ONE_FILE_BYTES else None)


def inline(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
  """Evaluates a jaxpr with its scans unrolled, inner calls opened and constants folded.

  So each layer has weights of its own in the graph, and masks are data: what ONNX runtimes run
  fastest, and all that jax2onnx converts with a symbolic batch.
  """
  values = dict(zip(jaxpr.constvars, constants, strict=True))
  values |= zip(jaxpr.invars, inputs, strict=True)

  def read(variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else values[variable]

  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    arguments = [read(variable) for variable in equation.invars]
    inner = parameters.get("jaxpr") or parameters.get("call_jaxpr")
    if name == "scan":
      outputs = _unroll(parameters, arguments)
    elif inner is not None:
      closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, [])
      outputs = inline(closed.jaxpr, closed.consts, arguments)
    else:
      outputs = _apply(equation, arguments)
    values |= zip(equation.outvars, outputs, strict=True)
  return [read(variable) for variable in jaxpr.outvars]


def _unroll(parameters: dict[str, Any], arguments: list[Any]) -> list[Any]:
  """A scan as plain calls. The models' scans carry the activations and stack nothing."""
  first, end = parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]
  body, carry = parameters["jaxpr"], arguments[first:end]
  for i in range(parameters["length"]):
    each = [stacked[i] for stacked in arguments[end:]]
    carry = inline(body.jaxpr, body.consts, [*arguments[:first], *carry, *each])
  assert len(carry) == parameters["num_carry"], "a scan that stacks outputs"
  return carry


def _apply(equation: Any, arguments: list[Any]) -> list[Any]:
  primitive, parameters = equation.primitive, equation.params
  known = not any(isinstance(x, jax.core.Tracer) for x in arguments)
  sizes = [size for variable in equation.outvars for size in variable.aval.shape]
  if known and all(isinstance(size, int) for size in sizes):
    with jax.ensure_compile_time_eval():
      outputs = primitive.bind(*arguments, **primitive.get_bind_params(parameters))
    outputs = outputs if primitive.multiple_results else [outputs]
    return [np.asarray(x) for x in outputs]
  outputs = primitive.bind(*arguments, **primitive.get_bind_params(parameters))
  return outputs if primitive.multiple_results else [outputs]


def _stablehlo(model: inference.Clip, folder: pathlib.Path) -> None:
  """NAME.stablehlo by `jax.export`, all three with `weights.safetensors` as their first argument.

  That argument is a dict of arrays by the names in the file; `jax.export.deserialize` reads a
  graph, and its `call(weights, *inputs)` runs it on any of the platforms.
  """
  flat = weights.flat(model.variables)
  writers.safetensors(folder / "weights.safetensors", {k: np.asarray(v) for k, v in flat.items()})
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flat)
  for graph in graphs(model, channels_first=False):

    def function(named: Any, *inputs: Any, g: Graph = graph) -> Any:
      return g.function(weights.nested(named), *inputs)

    specs = _specs(model, graph, channels_first=False)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, *specs)
    (folder / f"{graph.name}.stablehlo").write_bytes(exported.serialize())


def _savedmodel(model: inference.Clip, folder: pathlib.Path) -> None:
  """One SavedModel of three signatures; the whole model is `serving_default`."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  tf = importlib.import_module("tensorflow")
  jax2tf = importlib.import_module("jax.experimental.jax2tf")
  module = tf.Module()
  module.weights = jax.tree.map(lambda x: tf.Variable(np.asarray(x)), model.variables)
  signatures = {}
  dtypes = {"pixel_values": tf.float32, "input_ids": tf.int32}
  shapes = _shapes(model, channels_first=False)
  for graph in graphs(model, channels_first=False):
    symbolic = [str(tuple(shapes[name])).replace("'", "") for name in graph.inputs]
    convert = jax2tf.convert(
      graph.function,
      polymorphic_shapes=[None, *symbolic],
      with_gradient=False,
      native_serialization_platforms=PLATFORMS,
    )

    def function(*inputs: Any, g: Graph = graph, convert: Any = convert) -> dict[str, Any]:
      return dict(zip(g.outputs, convert(module.weights, *inputs), strict=True))

    specs = [
      tf.TensorSpec([None, *shapes[name][1:]], dtypes[name], name=name) for name in graph.inputs
    ]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    signatures["serving_default" if graph.name == "clip" else graph.name] = concrete
  tf.saved_model.save(module, str(folder), signatures)
