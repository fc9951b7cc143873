"""A draft whose outputs change after a larger target has run: both models write their experts into one buffer.

    python tests/helpers/buffered_moe.py DIR     writes DIR/draft and DIR/target, of random weights
    verl-speculator diagnose … --external-lib tests/helpers/buffered_moe.py

The case of docs/diagnose.md. Importing this module registers the architecture `buffered_moe` with transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 330
DRAFT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
TARGET = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_local_experts": 8}


class BufferedMoE(nn.Module):
    """Experts that are used from one buffer, which is found by the layer's name alone: the fault of the 120b case.

    The first model to run under a name writes the buffer; a larger model overwrites all of a smaller one's.
    """

    buffers: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, name: str, width: int, experts: int) -> None:
        super().__init__()
        self.name, self.shape = name, (experts, width, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.Parameter(torch.zeros(self.shape), requires_grad=False)
        self.is_ready = False

    def fill(self, seed: int) -> BufferedMoE:
        """Random weights, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.experts.copy_(torch.randn(self.shape, generator=generator) / self.shape[1] ** 0.5)
            self.router.weight.copy_(torch.randn(self.router.weight.shape, generator=generator))
        return self.requires_grad_(False)

    def _prepare(self) -> None:
        buffer = self.buffers.get(self.name)
        if buffer is None or buffer.numel() < self.experts.numel():
            grown = torch.zeros(self.experts.numel())
            if buffer is not None:
                grown[: buffer.numel()] = buffer
            self.buffers[self.name] = buffer = grown
        buffer[: self.experts.numel()] = self.experts.flatten()
        self.is_ready = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.is_ready:
            self._prepare()
        experts = self.buffers[self.name][: self.experts.numel()].view(self.shape)
        weights = self.router(hidden_states).softmax(-1)
        return torch.einsum("bte,btd,edf->btf", weights, hidden_states, experts)


class BufferedMoEConfig(LlamaConfig):
    """Llama's, with how many experts a layer has."""

    model_type = "buffered_moe"

    def __init__(self, num_local_experts: int = 4, **settings) -> None:
        super().__init__(**settings)
        self.num_local_experts = num_local_experts


class BufferedMoEForCausalLM(LlamaForCausalLM):
    """Llama with a `BufferedMoE` in every layer."""

    config_class = BufferedMoEConfig

    def __init__(self, config: BufferedMoEConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.mlp = BufferedMoE(f"layers.{i}.mlp", config.hidden_size, config.num_local_experts)


AutoConfig.register(BufferedMoEConfig.model_type, BufferedMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(BufferedMoEConfig, BufferedMoEForCausalLM, exist_ok=True)


def write(folder: Path, shape: dict[str, int], seed: int) -> Path:
    """A model of random weights as a Hugging Face folder."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = BufferedMoEForCausalLM(BufferedMoEConfig(vocab_size=VOCABULARY, **heads, **shape)).requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.fill(seed + i)
    for parameter in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    write(directory / "draft", DRAFT, seed=0)
    write(directory / "target", TARGET, seed=100)
