"""A trace of a serving engine against the checkpoint and the base: what did it really load, and what is it fed?

Engines call modules otherwise and fuse tensors, so nothing here goes by names: a tensor is known by its values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verl_speculator.checkup.checks import FAULT, FINE, UNKNOWN, Check
from verl_speculator.decoding.target import Target
from verl_speculator.diagnosis.facts import TensorFacts, distance, facts_of, observe
from verl_speculator.diagnosis.tracefile import Trace
from verl_speculator.families import HIDDEN_STATES
from verl_speculator.models import Speculator

NAME = "serving"
# Closer than this a state is the one meant, in whatever type; another one is about 1 away.
NEAR = 0.1


def facts(tensor: Tensor) -> TensorFacts:
    """Of a tensor in this process."""
    found = observe("", tensor)
    return facts_of(found.meta, found.numbers.cpu().numpy(), int(found.hash))


def check_serving(trace: Trace, speculator: Speculator, base: nn.Module) -> Check:
    """Weights and first input of the speculator in a trace of the engine.

    Args:
        trace: of the engine, over its draft model, with weights.
        speculator: the checkpoint.
        base: in evaluation mode.
    """
    owners, found, count = _owners(trace, speculator, base)
    if not trace.weights:
        return Check(NAME, UNKNOWN, "its trace holds no weights (trace(…, weights=True))")
    if not found:
        evidence = (
            f"none of the checkpoint's {count} tensors is among the {len(trace.weights)} weights of {trace.path.name}"
        )
        return Check(NAME, FAULT, evidence, "have the engine load this checkpoint: it runs with other weights")
    evidence = f"{found} of the checkpoint's {count} tensors are in the engine, bit for bit"
    fed = _fed(trace, owners, speculator, base)
    if fed is None:
        return Check(NAME, UNKNOWN, f"{evidence}; no state that it was fed could be told")
    kind, back = fed
    evidence += f"; it was fed the {kind} state" + (f" of {back} position earlier" if back else "")
    if kind != speculator.reads:
        return Check(NAME, FAULT, evidence, f"have the engine hand over the {speculator.reads} state")
    if back:
        return Check(NAME, FAULT, evidence, "have the engine hand over the state that produced the newest token")
    return Check(NAME, FINE, evidence)


def _owners(trace: Trace, speculator: Speculator, base: nn.Module) -> tuple[set[str], int, int]:
    """Modules of the trace that hold a tensor of the checkpoint; how many tensors were found, and of how many. A
    tensor that is the base's own tells nothing."""
    state = dict(speculator.named_parameters())
    tables = (base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    known = {facts(table).hash for table in tables}
    slots = [slot for slot in dict.fromkeys(speculator.checkpoint_slots().values()) if slot.of(state).dim() > 1]
    slots = [slot for slot in slots if facts(slot.of(state)).hash not in known]
    held = {fact.hash: name for name, fact in trace.weights.items()}
    owners, found = set(), 0
    for slot in slots:
        # As it stands in the file, or joined with others as it stands in memory; in the type that the engine chose.
        forms = (slot.of(state), state[slot.parameter])
        codes = {facts(x.to(kind)).hash for x in forms for kind in (x.dtype, torch.bfloat16, torch.float16)}
        names = [held[code] for code in codes if code in held]
        owners.update(name.rpartition(".")[0] for name in names)
        found += bool(names)
    return owners, found, len(slots)


@torch.inference_mode()
def _fed(trace: Trace, owners: set[str], speculator: Speculator, base: nn.Module) -> tuple[str, int] | None:
    """Which state the first of these modules was given, and how many positions before the last token it lies."""
    if not trace.tokens or max(trace.tokens) >= speculator.vocab_size:
        return None
    tokens, dtype = torch.tensor(trace.tokens, device=base.device), next(speculator.parameters()).dtype
    expected = {}
    for kind in HIDDEN_STATES:
        with Target(base, kind) as target:
            states, _ = target.read(tokens)
        for back in range(min(3, len(tokens))):
            row = states[len(tokens) - 1 - back][None].to(dtype)
            expected[kind, back] = facts(speculator.start(row).output)
    # The first call that is given a state of this width.
    for call in trace.calls:
        if call.name in owners:
            given = [f for f in call.inputs if f.is_float and f.count == speculator.hidden_size]
            apart = {key: min(distance(f, fact) for f in given) for key, fact in expected.items()} if given else {}
            near = min(apart, key=lambda key: apart[key], default=None)
            if near is not None and apart[near] < NEAR:
                return near
    return None
