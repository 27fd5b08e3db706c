"""Calibrate once, offline; deploy in another process, where nothing is calibrated any more.

    python examples/offline.py

The first half is what a team runs once and puts into version control: a JSON recipe. The second half is a fresh
process, as in production: it loads model and recipe, compiles, and answers. It also shows that a recipe is checked
where the weights have changed a little, and refused where they are others. Takes a few minutes on two CPU cores.

The same from a shell:

    afbs-compile calibrate examples/model-7m --data TEXT --seq-len 2048 --samples 3 -o model.recipe.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import SHIPPED_MODEL, help_topics, windows

import afbs_compile
from afbs_compile.errors import AfbsWarning, RecipeError


def calibrate(model: str | Path, path: Path, length: int, min_length: int) -> None:
    """The offline half: a recipe from three windows of text."""
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = windows(AutoTokenizer.from_pretrained(model), help_topics(), length, 3)
    began = time.perf_counter()
    recipe = afbs_compile.calibrate(language_model, [{"input_ids": ids} for ids in texts], min_length=min_length)
    recipe.save(path)
    print(f"offline: calibrated in {time.perf_counter() - began:.0f} s, wrote {path.name}")
    print(afbs_compile.explain(recipe))


@torch.no_grad()
def deploy(model: str | Path, path: Path, length: int, min_length: int) -> None:
    """The other half: compile with the recipe and answer; what a server does when it starts."""
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = windows(tokenizer, help_topics(), length, 4)[1]  # not one of the three
    options = {"recipe": str(path), "min_length": min_length}
    sparse = torch.compile(language_model, backend="afbs", options=options)
    began = time.perf_counter()
    token = sparse(prompt).logits[0, -1].argmax()
    print(f"deployed: compiled and answered {tokenizer.decode(token)!r} in {time.perf_counter() - began:.0f} s")
    print(f"deployed: dense answers         {tokenizer.decode(language_model(prompt).logits[0, -1].argmax())!r}")

    language_model.get_input_embeddings().weight[0] *= 1.01  # as after a little more training
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", AfbsWarning)
        torch.compile(language_model, backend="afbs", options=options)(prompt)
    print("deployed: trained further:", *(w.message for w in said if issubclass(w.category, AfbsWarning)))

    for parameter in language_model.parameters():
        parameter.normal_(std=0.02)
    torch._dynamo.reset()
    try:
        torch.compile(language_model, backend="afbs", options=options)(prompt)
    except Exception as error:
        reason = getattr(error, "inner_exception", error)
        if not isinstance(reason, RecipeError):
            raise
        print(f"deployed: with other weights: {reason}")


def main(model: str | Path = SHIPPED_MODEL, length: int = 2048, min_length: int = 1024) -> str:
    """Both halves, the second one in a process of its own; returns what that one printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.recipe.json"
        calibrate(model, path, length, min_length)
        sizes = ["--length", str(length), "--min-length", str(min_length)]
        command = [sys.executable, __file__, "--deploy", str(path), "--model", str(model), *sizes]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed)
    return printed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder or id of a causal language model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--min-length", type=int, default=1024, help="leave shorter attention alone")
    parser.add_argument("--deploy", type=Path, metavar="RECIPE", help="run the second half alone, with this recipe")
    given = parser.parse_args()
    if given.deploy is not None:
        deploy(given.model, given.deploy, given.length, given.min_length)
    else:
        main(given.model, given.length, given.min_length)
