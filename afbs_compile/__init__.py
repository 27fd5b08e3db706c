"""afbs_compile: attention made sparse by a compiler, calibrated per head inside an error bound.

``torch.compile(model, backend="afbs")`` does it all; :func:`calibrate` and :class:`Recipe` separate calibration
from compilation, and :func:`explain` tells what happened to every attention call.
"""

from afbs_compile.calibration import calibrate
from afbs_compile.gather import gather
from afbs_compile.recipe import Recipe
from afbs_compile.report.explain import explain
from afbs_compile.report.monitors import monitors
from afbs_compile.version import __version__

__all__ = ["Recipe", "__version__", "calibrate", "explain", "gather", "monitors"]
