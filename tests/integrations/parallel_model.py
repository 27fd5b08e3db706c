"""A tiny Llama on two ranks: what torchrun starts in test_tensor_parallel.py.

torchrun --nproc-per-node 2 -m tests.integrations.parallel_model (eager | compile)
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import afbs_compile
import afbs_compile.integrations.transformers as afbs
from tests.toy import without_a_clock

ASKED = {"min_length": 128, "tolerance": 0.5}
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def sharp_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    return model


@torch.no_grad()
def main(way: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    without_a_clock(pytest.MonkeyPatch())
    model, ids = sharp_llama(), torch.randint(64, (1, 512))
    whole = model(ids).logits
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    if way == "compile":
        model = torch.compile(model, backend="afbs", options=ASKED)
    else:
        afbs.use(model, **ASKED)
    error = float((model(ids).logits - whole).norm() / whole.norm())
    rows = [(row.site, row.outcome, row.heads) for row in afbs_compile.explain(model).rows]
    print(json.dumps({"rank": dist.get_rank(), "error": error, "rows": rows}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
