"""Branches that a constant decides, in a body whose functions are inlined: only the one taken stays.

onnxruntime would drop the others when it loads a file. TensorRT's parser does, too, but counts itself as inside such an
``If`` ever after, and no longer finds the attributes of the function that it is in.
"""

from __future__ import annotations

from typing import Any


def decide(nodes: Any) -> None:
    """Replace each ``If`` whose condition is a constant by the branch taken, at every depth.

    Args:
        nodes: the repeated ``NodeProto`` of a function in which every name is given once; changed in place.
    """
    _decide(nodes, {})


def _decide(nodes: Any, known: dict[str, bool]) -> None:
    """The same with the constants of the graphs around these nodes."""
    import onnx

    decided = []
    for node in nodes:
        if node.op_type == "Constant" and (value := _boolean(node)) is not None:
            known[node.output[0]] = value
        graphs = {attribute.name: attribute.g for attribute in node.attribute if attribute.HasField("g")}
        for graph in graphs.values():
            _decide(graph.node, known)
        if node.op_type == "If" and node.input[0] in known:
            branch = graphs["then_branch" if known[node.input[0]] else "else_branch"]
            decided += branch.node
            results = (result.name for result in branch.output)
            decided += [
                onnx.helper.make_node("Identity", [result], [name])
                for result, name in zip(results, node.output, strict=True)
            ]
        else:
            decided.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in decided]  # they live in what is deleted now
    del nodes[:]
    nodes.extend(kept)


def _boolean(node: Any) -> bool | None:
    """The value of a constant that is one boolean; ``None`` of any other."""
    import onnx

    (attribute,) = node.attribute
    if attribute.name != "value" or attribute.ref_attr_name or attribute.t.data_type != onnx.TensorProto.BOOL:
        return None
    value = onnx.numpy_helper.to_array(attribute.t)
    return bool(value) if value.ndim == 0 else None
