"""Makes the draft model known to vLLM, in each of its processes: the entry point `vllm.general_plugins`."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from verl_speculator.interop.engine_formats import DRAFT_MODEL


class SpeculatorDraftConfig(PretrainedConfig):
    """The config.json that `verl-speculator export --format vllm` writes; vLLM takes no other `model_type`. A class of
    the module, since vLLM sends it to its workers."""

    model_type = "mtp"


def register() -> None:
    """Register the draft model's class by name, and its configuration. Calling it again changes nothing."""
    from vllm import ModelRegistry

    AutoConfig.register(SpeculatorDraftConfig.model_type, SpeculatorDraftConfig, exist_ok=True)
    ModelRegistry.register_model(DRAFT_MODEL, f"verl_speculator.vllm_plugin.draft_model:{DRAFT_MODEL}")
