"""vLLM plugin: long prefills sparse, as a recipe says; decode steps and short requests by vLLM's own backend.

vLLM finds the plugin by its entry point, in each of its processes. It does nothing until the environment variable
``AFBS_VLLM_RECIPE`` names a recipe:

    AFBS_VLLM_RECIPE=model.recipe.json vllm serve your/model

On a CPU that is all. On CUDA the backend is chosen by name besides: ``--attention-backend CUSTOM``.
"""

from __future__ import annotations

import os

RECIPE_VARIABLE = "AFBS_VLLM_RECIPE"
"""The environment variable that names the recipe's file."""


def register() -> None:
    """Make the backend known to vLLM, which calls this by its entry point; a second time is harmless."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    logger = init_logger("vllm.afbs")
    if not os.environ.get(RECIPE_VARIABLE):
        logger.info("afbs: attention stays vLLM's own, %s names no recipe.", RECIPE_VARIABLE)
    elif current_platform.device_name == "cpu":
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.Backend")
    elif current_platform.device_name == "cuda":
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.cuda.Backend")
        logger.info("afbs: --attention-backend CUSTOM makes long prefills sparse.")
    else:
        logger.warning("afbs: attention stays vLLM's own, there is no backend for %s.", current_platform.device_name)


__all__ = ["RECIPE_VARIABLE", "register"]
