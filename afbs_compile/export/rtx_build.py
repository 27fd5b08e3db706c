"""One engine of TensorRT for RTX, built in a process of its own: ``python -m afbs_compile.export.rtx_build REQUEST``.

TensorRT ends the process in which it cannot go on. And its parser looks for ``libtensorrt_rtx.so`` where a network gets
a plugin, a name that its wheels do not install (1.7): :func:`build` gives it a folder with that name, which a process
must have been started with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afbs_compile.errors import ExportError

BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "tensorrt_rtx_libs"

Range = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The smallest, the usual and the largest shape of an input."""


def build(program: Path, engine: Path, ranges: Mapping[str, Range], *, plugin: bool) -> dict[str, int]:
    """Build an engine from an ONNX file.

    Args:
        program: the file; engine: where to write.
        ranges: for each input that has a free size.
        plugin: whether the nodes of this package become plugins, in place of the layers of their bodies.

    Returns:
        Of the network: ``layers``, and ``plugins`` among them.

    Raises:
        ExportError: TensorRT cannot parse the file or build the engine.
    """
    request = {"program": str(program), "engine": str(engine), "ranges": dict(ranges), "plugin": plugin}
    with tempfile.TemporaryDirectory() as folder:
        _name_library(Path(folder))
        paths = filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))
        done = subprocess.run(
            [sys.executable, "-m", "afbs_compile.export.rtx_build", json.dumps(request)],
            env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0 or not done.stdout.strip():
        said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise ExportError(f"TensorRT for RTX cannot build the engine: {said[-1]}")
    built: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return built


def _name_library(folder: Path) -> None:
    """Put the library into a folder under the name that the parser looks for."""
    spec = importlib.util.find_spec(LIBRARIES)
    for place in (spec and spec.submodule_search_locations) or ():
        for library in Path(place).glob("libtensorrt_rtx.so.*"):
            (folder / "libtensorrt_rtx.so").symlink_to(library)


def main(request: Mapping[str, Any]) -> int:
    """Build what is asked for, and print what it is; on failure one line on standard error, and 1."""
    trt = importlib.import_module(BINDINGS)
    logger = _logger(trt)
    program = Path(request["program"]).read_bytes()
    if request["plugin"]:
        from afbs_compile.export.rtx_plugin import register_plugins

        register_plugins()
        program = _without_bodies(program)  # the parser prefers a body to a plugin
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(program):
        error = parser.get_error(0)
        return _failed(f"{error.node_name()} ({error.node_operator()}): {' '.join(error.desc().split())}")
    config = builder.create_builder_config()
    if request["ranges"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["ranges"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return _failed(logger.errors[0] if logger.errors else "no reason given")
    Path(request["engine"]).write_bytes(engine)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    plugins = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    print(json.dumps({"layers": len(layers), "plugins": plugins}))
    return 0


def _failed(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


def _logger(trt: Any) -> Any:
    """A logger of TensorRT that keeps errors and forgets the rest."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))

    return Errors()


def _without_bodies(program: bytes) -> bytes:
    import onnx

    model = onnx.load_from_string(program)
    del model.functions[:]
    text: bytes = model.SerializeToString()
    return text


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
