"""The table of speculator families: one row each, readable without importing torch.

A family is one module of `verl_speculator.models` and one row here. The row says which settings the family reads, what
they default to and which settings it insists on; `verl_speculator.config` validates from the row, and
`verl_speculator.models` imports the module when a speculator is really built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family of speculators.

    Attributes:
        target: `module:Class` of the implementation, imported on first use.
        summary: what it is, in a line, for `--help`, `inspect` and the docs.
        dim_defaults: settings that name widths, with the default of each. A family that has none leaves it empty.
        merges_widths: whether `emb_dim` and `proj_dim` meet in a sum, and so must end in the same width.
        requires: settings that must hold one particular value, for example `{"tie_weights": True}`.
        serving_architecture: the name under which ArcticInference loads the checkpoint, None if it cannot.
    """

    target: str
    summary: str
    dim_defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    merges_widths: bool = False
    requires: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    serving_architecture: str | None = None


_MLP_DIMS = MappingProxyType({"inner_dim": 1024, "emb_dim": 1024, "proj_dim": 1024})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sum_rnn": Family(
            target="verl_speculator.models.sum_rnn:SumRNN",
            summary="MLP speculator: one summed recurrent state (IBM, Snowflake)",
            dim_defaults=_MLP_DIMS,
            merges_widths=True,
            serving_architecture="ArcticLSTMSpeculatorPreTrainedModel",
        ),
        "sum_lstm": Family(
            target="verl_speculator.models.sum_lstm:SumLSTM",
            summary="LSTM speculator: four summed gates and a cell (Snowflake Arctic)",
            dim_defaults=_MLP_DIMS,
            merges_widths=True,
            requires=MappingProxyType({"tie_weights": True}),
            serving_architecture="ArcticLSTMSpeculatorPreTrainedModel",
        ),
    }
)
