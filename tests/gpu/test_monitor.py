"""The monitor on a real GPU: beside CUDA graphs, and on a machine that others use too."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

import afbs_compile
from afbs_compile.backend import afbs
from afbs_compile.tuner.clock import is_busy
from tests.gpu.test_end_to_end import relative_l1
from tests.monitor.test_monitor import diffuse
from tests.toy import Toy, drifting

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")]

LENGTH = 4096


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore:afbs monitor")
def test_a_compiled_model_is_watched_and_its_heads_become_dense_without_a_compilation(mode):
    model = Toy().eval().to("cuda", torch.bfloat16)
    samples = [drifting(LENGTH, seed=seed).contiguous().to("cuda", torch.bfloat16) for seed in range(30)]
    recipe = afbs_compile.calibrate(model, samples, tolerance=0.05)
    options = {"recipe": recipe, "monitor": {"share": 1.0, "look_every": 1}}
    sparse = torch.compile(model, backend=partial(afbs, options=options), mode=mode, fullgraph=True)
    for seed in range(100, 110):
        x = drifting(LENGTH, seed=seed).contiguous().to("cuda", torch.bfloat16)
        torch.testing.assert_close(sparse(x).clone(), model(x), atol=0.1, rtol=0.1)
    (monitor,) = afbs_compile.monitors(sparse)
    assert monitor.alarms == ()
    assert max(row["sampled"] for row in monitor.to_records()) == 10
    x = diffuse(1000, LENGTH).to("cuda", torch.bfloat16)
    with torch.compiler.set_stance("fail_on_recompile"):
        before = relative_l1(sparse(x).clone(), model(x))
        for seed in range(60):
            sparse(diffuse(seed, LENGTH).to("cuda", torch.bfloat16))
        after = relative_l1(sparse(x).clone(), model(x))
    assert any(row["dense"] for row in monitor.to_records())
    assert after < before, "the heads that an alarm named are dense"


def test_another_process_on_the_gpu_is_recognised():
    device = torch.device("cuda")
    assert not is_busy(device)
    work = (
        "import torch; x = torch.ones(4096, 4096, device='cuda'); x @ x; torch.cuda.synchronize()\n"
        "print(flush=True)\n"
        "while True: x @ x; torch.cuda.synchronize()"
    )
    other = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert any(is_busy(device) for _ in range(3))
    finally:
        other.kill()
        other.wait()
