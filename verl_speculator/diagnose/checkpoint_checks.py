"""The checks that explain a low acceptance, in the order in which causes hide each other."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import FrozenNorm, final_norm
from verl_speculator.checkpoint.format import (
    CONFIG_FILE,
    STATE_DIRECTORY,
    STEP_DIRECTORY,
    CheckpointInfo,
    load_speculator,
    read_checkpoint_info,
    read_weights,
)
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.config.families import HIDDEN_STATES
from verl_speculator.decoding.target import Target
from verl_speculator.diagnose.acceptance import Acceptance, AlignedTexts
from verl_speculator.diagnose.tensor_stats import TensorFacts, distance, facts_of, observe
from verl_speculator.diagnose.trace_file import Trace
from verl_speculator.models import Speculator, build_speculator
from verl_speculator.utils.errors import UserError

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
    if kind != speculator.hidden_state_source:
        return Check(NAME, FAULT, evidence, f"have the engine hand over the {speculator.hidden_state_source} state")
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


FAULT, FINE, UNKNOWN = "fault", "fine", "unknown"
# A variant explains a low acceptance if it accepts this much more of all drafts, and half as much again or so much more
# that the rejected ones become fewer by as much.
MARGIN, FACTOR = 0.1, 1.5
SHIFTS = (-1, 0, 1)
DEPTH_DROP = 0.5
NORM_APART = 0.02
# What engines call the number of heads: a number, or a list with an entry for each.
HEAD_COUNTS = {"num_heads", "top_k_tokens_per_head"}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the check.
        status: `fault`, `fine`, or `unknown` where it could not be made.
        evidence: in a sentence.
        advice: what to do about a fault.
    """

    name: str
    status: str
    evidence: str
    advice: str = ""


@dataclass
class DiagnosisContext:
    """A checkpoint, its base, and texts to judge it on.

    Attributes:
        info: of the checkpoint.
        speculator: loaded.
        base: in evaluation mode.
        base_name: as it was given.
        own: the base's own answers to the prompts given.
        trained: its answers to prompts of the training data, None where those are not at hand.
        data: the training text itself, None likewise.
        num_draft: how many tokens the engine drafts in a round, None where that is not known.
    """

    info: CheckpointInfo
    speculator: Speculator
    base: nn.Module
    base_name: str
    own: AlignedTexts
    trained: AlignedTexts | None = None
    data: AlignedTexts | None = None
    num_draft: int | None = None

    def __post_init__(self) -> None:
        self.now = self.own.measure(self.speculator)


def explains(variant: Acceptance, now: Acceptance) -> bool:
    """Whether a variant accepts so much more that it is the cause."""
    more = variant.rate >= FACTOR * now.rate or FACTOR * (1 - variant.rate) <= 1 - now.rate
    return variant.rate >= now.rate + MARGIN and more


def percent(found: Acceptance) -> str:
    """An acceptance in words."""
    return f"{found.rate:.1%}"


def run_checks(patient: DiagnosisContext) -> Iterator[Check]:
    """All checks that need the model, in order."""
    checks: tuple[Callable[[DiagnosisContext], Check], ...] = (
        initialisation,
        base_weights,
        hidden_state,
        shift,
        number_type,
        scale_input,
        learning_rate_check,
        data,
        depth,
        heads,
    )
    return (check(patient) for check in checks)


def initialisation(patient: DiagnosisContext) -> Check:
    """Tensors that are still what `reset_parameters` gives."""
    name, module = "trained at all", patient.speculator
    frozen = module.frozen()
    constants = {n: v for n, v in module.constants().items() if n not in frozen}
    resting = [n for n, v in constants.items() if bool((module.get_parameter(n) == v).all())]
    if constants and len(resting) == len(constants):
        evidence = (
            f"all {len(constants)} tensors that start as constants still are: {resting[0]} = {constants[resting[0]]:g}"
        )
        advice = "load the trained checkpoint: this one holds its initialisation, no training step has changed it"
        return Check(name, FAULT, evidence, advice)
    broken = [n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        return Check(name, FAULT, f"{broken[0]} holds NaN or infinite values", "train anew with a lower optim.lr")
    if not constants:
        return Check(name, UNKNOWN, "it starts as parts of the base, and none of its tensors as constants")
    if resting:
        evidence = f"{len(resting)} of {len(constants)} constants are as initialised: {', '.join(resting[:3])}"
        whole = [n for n in resting if n.split(".")[1].isdigit() and n.split(".")[1] != "0"]
        if whole:
            return Check(
                name, FAULT, evidence, f"load or train {whole[0].rsplit('.', 1)[0]}: it holds its initialisation"
            )
        return Check(name, FINE, evidence)
    return Check(name, FINE, f"all {len(constants)} tensors that start as constants have moved")


def base_weights(patient: DiagnosisContext) -> Check:
    """The base against the one it was trained for."""
    name = "trained for this base"
    mine, theirs = patient.info.base_fingerprint(), weights_fingerprint(patient.base_name)
    if mine is None or theirs is None:
        return Check(name, UNKNOWN, f"no fingerprint of {'the training base' if mine is None else 'this base'}")
    if mine == theirs:
        return Check(name, FINE, f"the base's weights are those of training (fingerprint {mine[:8]})")
    evidence = f"trained for {patient.info.base_name} (fingerprint {mine[:8]}), this base is {theirs[:8]}"
    return Check(name, FAULT, evidence, f"serve it with {patient.info.base_name}, or train one for this base")


def hidden_state(patient: DiagnosisContext) -> Check:
    """The state after the final norm against the one before it, and the norm's copy against the base's."""
    name, speculator = "hidden state", patient.speculator
    if speculator.hidden_state_source not in HIDDEN_STATES:
        return Check(name, FINE, f"it reads {speculator.hidden_state_source}, which has no other form")
    found = {}
    for kind in HIDDEN_STATES:
        try:
            found[kind] = patient.own.measure(speculator, hidden_state_source=kind)
        except UserError as error:
            return Check(name, UNKNOWN, str(error))
    reads = speculator.hidden_state_source
    other = next(kind for kind in HIDDEN_STATES if kind != reads)
    evidence = ", ".join(f"{percent(found[kind])} accepted when fed {kind}" for kind in (reads, other))
    for module in speculator.modules():
        if isinstance(module, FrozenNorm):
            apart = _norms_apart(module, patient.base)
            evidence += f"; its norm is {apart:.1e} from the base's"
            if apart > NORM_APART:
                advice = "its copy of the base's final norm is another: take it over from this base"
                return Check(name, FAULT, evidence, advice)
    if explains(found[other], found[reads]):
        advice = f"it was trained on {other} states and is fed {reads}: train it on the state that is served"
        return Check(name, FAULT, evidence, advice)
    return Check(name, FINE, evidence)


def _norms_apart(mine: FrozenNorm, base: nn.Module) -> float:
    """Relative difference of a copied norm's weight from the base's own, as the base applies it."""
    theirs = FrozenNorm(len(mine.weight)).requires_grad_(False).to(mine.weight.device)
    theirs.copy_from(final_norm(base))
    return ((mine.weight.float() - theirs.weight).norm() / theirs.weight.norm()).item()


def shift(patient: DiagnosisContext) -> Check:
    """Targets one place off, and tokens where it reads any."""
    tokens = SHIFTS if patient.speculator.reads_tokens else (0,)
    found = {
        (token, target): patient.own.measure(patient.speculator, token_shift=token, target_shift=target)
        for token in tokens
        for target in SHIFTS
    }
    told = [f"{percent(found[0, s])} with targets shifted by {s:+d}" for s in (-1, 1)]
    told += [f"{percent(found[s, 0])} with tokens shifted by {s:+d}" for s in tokens if s]
    evidence = f"{percent(patient.now)} as aligned, {', '.join(told)}"
    best = max(found, key=lambda key: found[key].rate)
    if best != (0, 0) and explains(found[best], patient.now):
        what = [f"{part} by {s:+d}" for part, s in zip(("tokens", "targets"), best, strict=True) if s]
        evidence += f"; best {percent(found[best])} with {' and '.join(what)}"
        advice = (
            f"it was trained with its {' and its '.join(what)} off: mend the shift where it was trained, and train anew"
        )
        return Check("alignment", FAULT, evidence, advice)
    return Check("alignment", FINE, evidence)


def number_type(patient: DiagnosisContext) -> Check:
    """The types that it is served in against float32; each read anew, since a narrow type rounds the weights too."""
    name, info = "number type", patient.info
    own = str(next(patient.speculator.parameters()).dtype).removeprefix("torch.")
    if patient.speculator.shared_layers is not None:
        return Check(name, FINE, f"it runs on the base's blocks, in their type, {own}")
    found = {own: patient.now}
    for kind in ("float32", "bfloat16"):
        if kind not in found:
            other = load_speculator(info.directory, device=patient.base.device, dtype=getattr(torch, kind))
            found[kind] = patient.own.measure(other.eval())
    evidence = ", ".join(f"{percent(value)} in {kind}" for kind, value in found.items())
    evidence += f"; on disk it is {info.dtype}"
    for kind, value in found.items():
        if explains(found["float32"], value):
            return Check(name, FAULT, evidence, f"run it in float32: {kind} is too coarse for it")
    return Check(name, FINE, evidence)


def scale_input(patient: DiagnosisContext) -> Check:
    """The setting turned round."""
    config, speculator = patient.info.config, patient.speculator
    if "scale_input" not in config.read_settings(config.method):
        return Check("scale_input", FINE, f"{config.method} has no such setting")
    turned = dataclasses.replace(config, scale_input=not config.scale_input)
    shape = {"hidden_size": speculator.hidden_size, "vocab_size": speculator.vocab_size}
    other = build_speculator(turned, **shape, device="meta")
    other.load_state_dict(speculator.state_dict(), assign=True)
    found = patient.own.measure(other)
    evidence = f"{percent(patient.now)} with {config.scale_input}, {percent(found)} with {turned.scale_input}"
    if explains(found, patient.now):
        advice = f"set scale_input={str(turned.scale_input).lower()} in its config.json: its weights were trained so"
        return Check("scale_input", FAULT, evidence, advice)
    return Check("scale_input", FINE, evidence)


def learning_rate_check(patient: DiagnosisContext) -> Check:
    """Whether training still moved when it was saved."""
    status, evidence = learning_rate(patient.info)
    advice = (
        "raise optim.lr or trainer.total_training_steps, and go on from it with model.speculator.path" if status else ""
    )
    return Check("learning rate", {True: FAULT, False: FINE, None: UNKNOWN}[status], evidence, advice)


def data(patient: DiagnosisContext) -> Check:
    """Acceptance on what it was trained on against the prompts given."""
    name, told = "data", [f"{percent(patient.now)} on the base's answers to the prompts given"]
    if patient.trained is None or patient.data is None:
        return Check(name, UNKNOWN, f"{told[0]}; its training data are not at hand (--train-data FILE)")
    trained, text = (bench.measure(patient.speculator) for bench in (patient.trained, patient.data))
    told += [f"{percent(trained)} on its answers to training prompts", f"{percent(text)} on the training text itself"]
    if explains(trained, patient.now):
        return Check(name, FAULT, ", ".join(told), "train on data like the prompts that are served")
    if explains(text, trained):
        advice = "train on the base's own answers (verl-speculator regenerate): the text is not what the base says"
        return Check(name, FAULT, ", ".join(told), advice)
    return Check(name, FINE, ", ".join(told))


def depth(patient: DiagnosisContext) -> Check:
    """The first depth at which the chain of drafts breaks."""
    depths = patient.now.depths
    told = ", ".join("–" if math.isnan(d) else f"{d:.0%}" for d in depths)
    evidence = f"accepted of what reached each depth: {told}"
    if depths[0] < MARGIN:
        advice = "even the first draft is wrong: train longer, or with a larger optim.lr (train/depth0_accuracy)"
        return Check("depths", FAULT, evidence, advice)
    for k in range(1, len(depths)):
        if not math.isnan(depths[k]) and depths[k] < DEPTH_DROP * depths[k - 1]:
            evidence += f"; the chain breaks at depth {k}"
            advice = (
                f"draft {k} tokens (--draft-length {k}), and look at what only depth {k} has: its head, its projection"
            )
            return Check("depths", FAULT, evidence, advice)
    return Check("depths", FINE, evidence)


def heads(patient: DiagnosisContext) -> Check:
    """The depths of the checkpoint against what engines read elsewhere in its config.json, and what is asked of it."""
    name, count = "n_predict and heads", patient.info.config.n_predict
    evidence = f"n_predict={count}, and the file's tensors are those of {count} depths"
    content = json.loads((patient.info.directory / CONFIG_FILE).read_text())
    for key in HEAD_COUNTS & content.keys():
        said = content[key] if isinstance(content[key], int) else len(content[key])
        if said != count:
            told = f"{evidence}; its {key} speaks of {said}, and that is what serving engines read"
            return Check(name, FAULT, told, f"have {key} in its config.json speak of {count}")
    if patient.num_draft is None:
        return Check(name, FINE, evidence)
    evidence += f"; {patient.num_draft} tokens are drafted a round"
    if patient.num_draft > count:
        more = f"train with n_predict={patient.num_draft}"
        advice = f"have the engine draft {count} tokens (num_speculative_tokens), or {more}"
        return Check(name, FAULT, evidence, advice)
    return Check(name, FINE, evidence)


def recommendation(checks: list[Check]) -> str:
    """One thing to do: about the first fault."""
    first = next((check for check in checks if check.status == FAULT), None)
    if first is not None:
        return f"{first.name}: {first.advice}."
    return "Nothing is wrong with the checkpoint: more training, or more data like what is served, is what is left."


def learning_rate(info: CheckpointInfo) -> tuple[bool | None, str]:
    """Whether training stood still, None where that is not known, and the evidence."""
    training = info.provenance.get("training", {})
    step, total = training.get("step"), training.get("total_steps")
    if training.get("lr") == 0:
        return True, "optim.lr was 0"
    before = _before(info)
    if before is not None:
        mine, theirs = read_weights(info), read_weights(before)
        if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
            return (
                True,
                f"{before.directory.name} and {info.directory.name} hold the same weights: no step between moved one",
            )
    rate = _last_rate(info)
    if rate is None:
        told = f", step {step} of {total}" if step is not None else ""
        return None, f"no {STATE_DIRECTORY} beside it{told}"
    evidence = f"the learning rate was {rate:.1e} at step {step} of {total}"
    return rate == 0 and step is not None and total is not None and step < total, evidence


def _before(info: CheckpointInfo) -> CheckpointInfo | None:
    """The run's checkpoint before this one."""
    match = STEP_DIRECTORY.match(info.directory.resolve().name)
    if match is None:
        return None
    steps = {
        int(found[1]): path
        for path in info.directory.resolve().parent.iterdir()
        if (found := STEP_DIRECTORY.match(path.name)) and int(found[1]) < int(match[1])
    }
    try:
        return read_checkpoint_info(steps[max(steps)]) if steps else None
    except UserError:
        return None


def _last_rate(info: CheckpointInfo) -> float | None:
    try:
        state = torch.load(info.directory / STATE_DIRECTORY / "lr_scheduler.pt", weights_only=True)
        return max(float(rate) for rate in state["_last_lr"])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError):
        return None
