"""What the converter's graph lacks before it is an ONNX file that others like to feed and run.

Graphs are `onnx_ir.Model`, changed in place; `ir` is the module `onnx_ir`, which is not always
installed.
"""

import math
from typing import Any


def widen_tokens(ir: Any, model: Any) -> None:
  """`input_ids` come in as int64, which JAX does not have by default, and are narrowed first."""
  for index, narrow in enumerate(model.graph.inputs):
    if narrow.name != "input_ids":
      continue
    narrow.name = "input_ids_int32"
    wide = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=narrow.shape)
    cast = ir.node("Cast", [wide], {"to": ir.DataType.INT32})
    cast.outputs[0].type, cast.outputs[0].shape = narrow.type, narrow.shape
    ir.convenience.replace_all_uses_with(narrow, cast.outputs[0])
    model.graph.inputs[index] = wide
    model.graph.insert_before(model.graph[0], cast)


def multiply_by_matrices(ir: Any, model: Any) -> None:
  """Products with weights become MatMul, where the converter writes Einsum.

  onnxruntime lays a matrix out once, when it loads; an Einsum's second operand each time it runs.
  """
  initializers = model.graph.initializers
  for node in list(model.graph):
    if node.op_type != "Einsum" or node.inputs[1].name not in initializers:
      continue
    x, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
    split = _split(node.attributes["equation"].as_string())
    if split is None:
      continue
    kept, summed = split
    array = weight.const_value.numpy()
    rows = math.prod(array.shape[:summed])
    matrix = ir.Value(name=f"{product.name}_matrix", const_value=ir.tensor(array.reshape(rows, -1)))
    matrix.shape, matrix.type = matrix.const_value.shape, weight.type
    initializers.add(matrix)
    new: list[Any] = []
    if summed > 1:
      x = _reshape(ir, model, new, x, [0] * kept + [-1])
    new.append(ir.node("MatMul", [x, matrix]))
    result = new[-1].outputs[0]
    if array.ndim - summed != 1:
      result = _reshape(ir, model, new, result, [0] * kept + list(array.shape[summed:]))
    for value in (n.outputs[0] for n in new):
      value.type = product.type
    result.shape = product.shape
    model.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(product, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    if not weight.uses():
      del initializers[weight.name]


def _split(equation: str) -> tuple[int, int] | None:
  """(axes kept of the left, axes summed) of "<kept><summed>,<summed><rest>-><kept><rest>"."""
  left, right, out = equation.replace("->", ",").replace(" ", "").split(",")
  summed = sum(letter in right for letter in left)
  kept = left[: len(left) - summed]
  if left != kept + right[:summed] or out != kept + right[summed:]:
    return None
  return len(kept), summed


def _reshape(ir: Any, model: Any, nodes: list[Any], x: Any, shape: list[int]) -> Any:
  """Adds a Reshape to `nodes`; 0 keeps a size. Returns: its output."""
  name = "shape_" + "_".join(map(str, shape))
  sizes = model.graph.initializers.get(name)
  if sizes is None:
    tensor = ir.tensor(shape, dtype=ir.DataType.INT64, name=name)
    sizes = ir.Value(
      name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64)
    )
    model.graph.initializers.add(sizes)
  nodes.append(ir.node("Reshape", [x, sizes]))
  return nodes[-1].outputs[0]
