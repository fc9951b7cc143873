"""Shapes of every family that the contract suite runs over. A family without a row here fails the suite."""

import torch
from torch import nn

from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.models.speculator import TokenBatch

VARIANTS = {
    "sum_rnn": [
        {},
        {"tie_weights": False},
        {"scale_input": True, "n_predict": 1},
        {"inner_dim": "24.32"},
        {"inner_dim": "20.24", "emb_dim": "16.24", "proj_dim": "40.32.24", "tie_weights": False},
        {"draft_vocab_size": 50},
        {"embedding": "base", "head": "base", "draft_vocab_size": 50},
        {"embedding": "base_frozen", "head": "base_frozen", "inner_dim": 20, "emb_dim": 20, "proj_dim": 20},
        {"embedding": "base_frozen", "head": "base_frozen", "draft_vocab_size": 50},
    ],
    "sum_lstm": [
        {},
        {"tie_lstm_embs": True, "n_predict": 1},
        {"scale_input": True, "inner_dim": "24.32"},
        {"inner_dim": 20, "emb_dim": "16.24", "proj_dim": "32.24", "tie_lstm_embs": True},
        {"inner_dim": "16.24", "emb_dim": "16.24", "proj_dim": "16.24"},
        {"draft_vocab_size": 50, "tie_lstm_embs": True},
        {"embedding": "base", "head": "base_frozen", "tie_lstm_embs": True, "emb_dim": "16.24", "proj_dim": "16.24"},
        {"embedding": "base_frozen", "head": "base", "tie_lstm_embs": True, "inner_dim": "24.32"},
    ],
    "medusa": [
        {"inner_dim": None},
        {"inner_dim": 8, "num_layers": 2},
        {"head": "shared", "n_predict": 1},
        {"head": "frozen_shared", "hidden_state": "pre_norm", "inner_dim": None},
        {"hidden_state": "pre_norm", "num_layers": 3, "inner_dim": None},
        {"draft_vocab_size": 50, "inner_dim": None},
    ],
    "early_exit": [
        {"exit_layer": 1},
        {"exit_layer": 0, "trainable": "head_and_block", "n_predict": 4},
        {"exit_layer": 1, "draft_vocab_size": 50},
    ],
    "eagle3": [
        {"embedding": "own", "head": "own"},
        {"num_layers": 2, "embedding": "base", "draft_vocab_size": 50},
        {"embedding": "base_frozen", "head": "base_frozen", "norm_before_residual": True},
        {"draft_vocab_size": 50, "n_predict": 2, "ttt_steps": 4},
    ],
}
# What the draft layer of eagle3 takes from a base model.
LAYER = {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 24},
    **{"rms_norm_eps": 1e-6, "rope": {"rope_type": "default", "rope_theta": 1e4}, "positions": 64},
}


# The block of a base that an early exit trains a copy of.
BLOCK_SHAPES = {"attention.q.weight": [20, 20], "norm.weight": [20], "mlp.up.bias": [24]}


def shape_of(config: SpeculatorConfig, hidden_size: int, vocab_size: int) -> dict:
    """What `build_speculator` needs to know of the base."""
    block = BLOCK_SHAPES if config.trainable == "head_and_block" else None
    size = config.draft_vocab_size
    tokens = None if size is None else [*range(size - 1), vocab_size - 1]  # ids differ from rows at the last one
    return {"hidden_size": hidden_size, "vocab_size": vocab_size, "draft_tokens": tokens, "block_shapes": block}


class Tables(nn.Module):
    """An embedding and an LM head, as far as a speculator sees a base model."""

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        weights = torch.randn(2, vocab_size, width, generator=generator, dtype=torch.float64).to(dtype)
        self.embedding, self.head = nn.Embedding(1, 1), nn.Linear(1, 1, bias=False)
        self.embedding.weight, self.head.weight = (nn.Parameter(w, requires_grad=False) for w in weights)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def build_attached(config: SpeculatorConfig, hidden_size: int, vocab_size: int, **options) -> Speculator:
    """A speculator with what it needs to run: a draft vocabulary, and the tables of a base model."""
    speculator = build_speculator(config, **shape_of(config, hidden_size, vocab_size), **options)
    if config.frozen_tables:
        speculator.attach(Tables(vocab_size, hidden_size, options.get("dtype", torch.float32)))
    return speculator


def as_documents(hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, TokenBatch]:
    """States and tokens of documents, one row each: a state [T, D], then the tokens [T, K] after it."""
    count, depths = tokens.shape
    taken = torch.zeros(1, count * (depths + 1), hidden.shape[1], dtype=hidden.dtype)
    rows = torch.arange(count) * (depths + 1)
    taken[0, rows] = hidden
    lengths = torch.full_like(rows, depths + 1)
    return taken, TokenBatch(torch.cat([tokens[:, :1], tokens], 1).flatten(), torch.stack([rows, lengths], 1), rows)


def unrolled(speculator: Speculator, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[K, T, E] the states of all depths, from states [T, D] and the tokens [T, K] after each."""
    if speculator.reads_sequence:
        taken, batch = as_documents(hidden, tokens)
        hidden = speculator.draft_states(taken, tokens, batch)
    return speculator.unroll(hidden, tokens)


def configurations() -> dict[str, SpeculatorConfig]:
    """Every variant under a name for pytest."""
    small = {"n_predict": 3, "inner_dim": 24, "emb_dim": 24, "proj_dim": 24, "aux_layers": [0, 1, 2], "layer": LAYER}
    return {
        "-".join([method, *(f"{k}_{v}" for k, v in settings.items())]): SpeculatorConfig(
            method=method, **(small | settings)
        )
        for method, variants in VARIANTS.items()
        for settings in variants
    }
