"""Which serving engine can load a checkpoint as it stands, and what keeps the others from it.

Read from the sources of the versions that are named (docs/checkpoint-format.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_speculator.config import SpeculatorConfig


@dataclass(frozen=True)
class Serving:
    """One engine's answer to a checkpoint.

    Attributes:
        engine: name and versions.
        obstacle: why it cannot load the checkpoint, None if it can.
    """

    engine: str
    obstacle: str | None


def arctic_obstacle(config: SpeculatorConfig) -> str | None:
    """What keeps ArcticInference 0.3.0 from serving a speculator, and what to train instead; None if nothing does."""
    if config.method not in ("sum_rnn", "sum_lstm"):
        return f"method={config.method}: it serves sum_rnn and sum_lstm"
    for name, dims in (("emb_dim", config.emb_dims), ("proj_dim", config.proj_dims)):
        if len(dims) > 1:
            return f"{name}={getattr(config, name)}: it reads a single width"
    if config.inner_dims[0] != config.emb_dims[-1]:
        # It computes the weight of the embedding from inner_dim[0]; training here and there takes emb_dim[-1].
        return f"inner_dim={config.inner_dim}, emb_dim={config.emb_dim}: it takes both for one number"
    if config.method == "sum_lstm":
        if len(config.inner_dims) > 1:
            return f"inner_dim={config.inner_dim}: it reads a single width for sum_lstm"
        if not config.tie_lstm_embs:
            return "tie_lstm_embs=false: it decodes with tied embeddings alone"
    return None


def medusa_obstacle(config: SpeculatorConfig) -> str | None:
    """What keeps vLLM 0.24 to 0.32 from serving a speculator as Medusa heads, None if nothing does."""
    if config.method != "medusa":
        return f"method={config.method}: no released version serves it"
    if config.inner_dim is not None:
        return f"inner_dim={config.inner_dim}: it knows no bottleneck"
    if config.hidden_state != "post_norm":
        return f"hidden_state={config.hidden_state}: it hands over the state after the final norm"
    return None


def serving_engines(config: SpeculatorConfig) -> list[Serving]:
    """Every engine that is known, with what keeps it from serving a speculator of this configuration."""
    return [
        Serving("verl_speculator.decoding", None),
        Serving("ArcticInference 0.3.0 (vLLM 0.26.0)", arctic_obstacle(config)),
        Serving("vLLM 0.24 to 0.32 without plugins", medusa_obstacle(config)),
    ]
