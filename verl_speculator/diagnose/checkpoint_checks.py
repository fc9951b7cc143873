"""Why a checkpoint is not accepted: checks in the order in which one cause hides another.

The base model answers some prompts greedily. Acceptance is measured at every position of the answers, as the
speculator is served and under each suspicion: a variant that accepts much more names the cause.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.hidden_states import FrozenNorm, HiddenStateHook, final_norm
from verl_speculator.base_model.loading import base_shape, choose_device, choose_dtype, load_base, load_tokenizer
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
from verl_speculator.decoding import speculative_generate
from verl_speculator.decoding.target import Target, position_limit
from verl_speculator.diagnose import DiagnosisSettings
from verl_speculator.diagnose.experiments import import_external
from verl_speculator.diagnose.trace_file import Trace, distance, read_trace, stats_of
from verl_speculator.evaluation.metrics import acceptance, align_and_unroll
from verl_speculator.evaluation.prompts import Prompt, prompt_ids, read_prompts, read_texts
from verl_speculator.models import DraftState, Speculator, build_speculator
from verl_speculator.utils.process import evenly_spaced, progress_bar
from verl_speculator.utils.settings import UserError

FAULT, FINE, UNKNOWN = "fault", "fine", "unknown"
HEADS = "n_predict and heads"
# A variant explains a low acceptance if its rate is higher by MARGIN, and either FACTOR times the rate or so much
# higher that the share of rejected drafts falls by FACTOR.
MARGIN, FACTOR = 0.1, 1.5
SHIFTS = (-1, 0, 1)
# The chain of drafts breaks at a depth that accepts less than this share of what the depth before it accepts.
DEPTH_DROP = 0.5
# Relative difference of a copied norm above which it is the norm of another model.
NORM_DIFFERENCE = 0.02
# Hidden states closer than this are the same, in any type; unrelated ones are about √2 apart.
SAME_STATE = 0.1
# A draft vocabulary that lacks more than this share of what is written costs more drafts than its smaller head saves.
COVERAGE = 0.9
# What engines call the number of heads: a number, or a list with an entry for each.
HEAD_COUNTS = ("num_heads", "top_k_tokens_per_head")

Text = tuple[list[int], list[int]]  # token ids, and 1 where the assistant produced them
Finding = tuple[str, str | None]  # evidence and advice, as in `Check`


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check.
        evidence: one sentence.
        advice: what to do about a fault; empty if there is none, None if the check could not be made.
    """

    name: str
    evidence: str
    advice: str | None = ""

    @property
    def status(self) -> str:
        """`fault`, `fine` or `unknown`."""
        return UNKNOWN if self.advice is None else FAULT if self.advice else FINE


@dataclass(frozen=True)
class Acceptance:
    """How many drafts in a row are the text's own tokens, over every position of the texts.

    Attributes:
        positions: number of positions.
        rate: share of all drafts; 0 without any position.
        depths: [K] share accepted of the drafts that reached each depth; nan where none did.
    """

    positions: int
    rate: float
    depths: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.rate:.1%}"

    def explains(self, served: Acceptance) -> bool:
        """Whether this variant accepts so much more than the served one that it is the cause."""
        factor = self.rate >= FACTOR * served.rate or FACTOR * (1 - self.rate) <= 1 - served.rate
        return factor and self.rate >= served.rate + MARGIN


def greedy_answers(base: nn.Module, prompts: Iterable[list[int]], count: int, ends: Collection[int]) -> list[Text]:
    """Prompts with the base model's greedy answers of at most `count` tokens. Leaves out prompts that fill its
    context."""
    limit, texts = position_limit(base), []
    for ids in prompts:
        if limit is None or len(ids) + 2 <= limit:
            answer = speculative_generate(base, None, ids, max_new_tokens=count, eos_token_id=tuple(ends)).tokens
            texts.append(([*ids, *answer], [0] * len(ids) + [1] * len(answer)))
    return texts


class AlignedTexts:
    """Texts with the base model's hidden states, which are computed once for each source.

    Args:
        base: in evaluation mode.
        texts: what the drafts should be.
        ends: tokens that end a turn.
    """

    def __init__(self, base: nn.Module, texts: Iterable[Text], ends: Collection[int]) -> None:
        limit = position_limit(base)
        self.base, self.ends = base, ends
        self.texts = [(tokens[:limit], mask[:limit]) for tokens, mask in texts]
        self._states: dict[str, list[Any]] = {}

    @torch.inference_mode()
    def states(self, hidden_state_source: str) -> list[Any]:
        """What a speculator reads of every text: states [1, T, D], or the arguments of a decoder layer."""
        if hidden_state_source not in self._states:
            states = self._states[hidden_state_source] = []
            for tokens, _ in self.texts:
                with HiddenStateHook(self.base, hidden_state_source) as hook:
                    self.base(input_ids=torch.tensor([tokens], device=self.base.device), use_cache=False)
                    states.append(hook.take())
        return self._states[hidden_state_source]

    @torch.inference_mode()
    def measure(self, speculator: Speculator, *, hidden_state_source: str | None = None, **shifts: int) -> Acceptance:
        """Greedy acceptance at every position at which all depths have a target.

        Args:
            speculator: of this base model.
            hidden_state_source: the states that it is given; its own by default.
            shifts: `token_shift` and `target_shift` of `alignment.misaligned`.
        """
        is_early_exit = speculator.shared_layers is not None
        depths = speculator.n_predict if is_early_exit else speculator.depths
        histogram = np.zeros(depths + 1)
        speculator.attach(self.base)
        all_states = self.states(hidden_state_source or speculator.hidden_state_source)
        for text, states in zip(self.texts, all_states, strict=True):
            tokens, mask = (torch.tensor(x, device=self.base.device) for x in text)
            rows, outputs = align_and_unroll(speculator, states, tokens, mask, self.ends, **shifts)
            drafts = torch.stack([speculator.most_likely(k, output) for k, output in enumerate(outputs)])
            correct, valid = drafts == rows.targets, rows.valid.all(0)
            if is_early_exit:  # it drafts every depth with its first one, at the next position
                count = max(len(rows.positions) - depths + 1, 0)
                starts, ends = rows.positions[:count], rows.positions[depths - 1 :][:count]
                correct, valid = (torch.stack([x[k:][:count] for k in range(depths)]) for x in (correct[0], valid))
                valid = valid.all(0) & (ends - starts == depths - 1)
            accepted = correct.long().cumprod(0).sum(0)[valid]
            histogram += np.bincount(accepted.cpu().numpy(), minlength=depths + 1)
        figures = acceptance(histogram, np.zeros(depths))
        rate = float(figures["accept_rate"]) if histogram.sum() else 0.0
        return Acceptance(int(histogram.sum()), rate, tuple(float(figures[f"accept_depth_{k}"]) for k in range(depths)))


@dataclass
class DiagnosisContext:
    """A checkpoint, its base model, and the texts that it is measured on.

    Attributes:
        base_name: as the user gave it.
        answers: the base model's answers to the given prompts.
        training_answers: its answers to prompts of the training data, None where those are not available.
        training_text: the training data itself, None likewise.
        num_draft: number of tokens that the engine drafts in a round, None if unknown.
        engine_trace: of the serving engine's draft model, with weights; None without one.
    """

    info: CheckpointInfo
    speculator: Speculator
    base: nn.Module
    base_name: str
    answers: AlignedTexts
    training_answers: AlignedTexts | None = None
    training_text: AlignedTexts | None = None
    num_draft: int | None = None
    engine_trace: Trace | None = None

    def __post_init__(self) -> None:
        self.served = self.answers.measure(self.speculator)


def trained_at_all(context: DiagnosisContext) -> Finding:
    """Tensors that still are what `reset_parameters` makes, or that are not finite."""
    speculator = context.speculator
    constants = {name: value for name, value in speculator.constants().items() if name not in speculator.frozen()}
    initial = [name for name, value in constants.items() if bool((speculator.get_parameter(name) == value).all())]
    if constants and len(initial) == len(constants):
        first = f"{initial[0]} = {constants[initial[0]]:g}"
        advice = "load the trained checkpoint: this one holds its initialisation, no training step has changed it"
        return f"all {len(constants)} tensors that start as constants still are: {first}", advice
    for name, parameter in speculator.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} holds NaN or infinite values", "train again with a lower optim.lr"
    if not constants:
        return "it starts as parts of the base model, and none of its tensors as constants", None
    if not initial:
        return f"all {len(constants)} tensors that start as constants have changed", ""
    # A depth that no training step reached keeps all it started with.
    depths = [name.rpartition(".")[0] for name in initial if name.split(".")[1].lstrip("0").isdigit()]
    evidence = f"{len(initial)} of {len(constants)} constants are as initialised: {', '.join(initial[:3])}"
    return evidence, f"load or train {depths[0]}: it holds its initialisation" if depths else ""


def trained_for_this_base(context: DiagnosisContext) -> Finding:
    """The base model against the one that the speculator was trained for."""
    expected, actual = context.info.base_fingerprint(), weights_fingerprint(context.base_name)
    if expected is None or actual is None:
        return f"no fingerprint of {'the training base' if expected is None else 'this base'}", None
    if expected == actual:
        return f"the base's weights are those of training (fingerprint {actual[:8]})", ""
    name = context.info.base_name
    evidence = f"trained for {name} (fingerprint {expected[:8]}), this base is {actual[:8]}"
    return evidence, f"serve it with {name}, or train one for this base"


def serving(context: DiagnosisContext) -> Finding | None:
    """The weights and the first hidden state of the speculator in the engine's trace."""
    trace = context.engine_trace
    if trace is None:
        return None
    if not trace.weights:
        return "its trace holds no weights (trace(…, weights=True))", None
    modules, loaded, count = _modules_with_weights(trace, context)
    if not loaded:
        known = f"the {len(trace.weights)} weights of {trace.path.name}"
        advice = "have the engine load this checkpoint: it runs with other weights"
        return f"none of the checkpoint's {count} tensors is among {known}", advice
    evidence = f"{loaded} of the checkpoint's {count} tensors are in the engine, bit for bit"
    state = _first_hidden_state(trace, modules, context.speculator, context.base)
    if state is None:
        return f"{evidence}; the hidden state that it was given is not known", None
    source, distance_back = state
    evidence += f"; it was given the {source} state{f' of {distance_back} position earlier' * bool(distance_back)}"
    if source != context.speculator.hidden_state_source:
        return evidence, f"have the engine hand over the {context.speculator.hidden_state_source} state"
    return evidence, "have the engine hand over the state that produced the newest token" if distance_back else ""


def _modules_with_weights(trace: Trace, context: DiagnosisContext) -> tuple[set[str], int, int]:
    """Modules of the trace that hold a tensor of the checkpoint; how many tensors they hold, of how many. Tensors that
    are the base model's own are not counted: the engine holds them anyway."""
    speculator, base = context.speculator, context.base
    state = read_weights(context.info)  # as on disk: what was loaded here may be rounded otherwise than in the engine
    of_base = {stats_of(m.weight).hash for m in (base.get_input_embeddings(), base.get_output_embeddings())}
    slots = [slot for slot in dict.fromkeys(speculator.checkpoint_slots().values()) if slot.of(state).dim() > 1]
    slots = [slot for slot in slots if stats_of(slot.of(state)).hash not in of_base]
    names = {stats.hash: name for name, stats in trace.weights.items()}
    modules, loaded = set(), 0
    for slot in slots:
        # Separate as on disk, or joined as in memory; in the type that the engine chose.
        forms = (slot.of(state), state[slot.parameter])
        hashes = {stats_of(x.to(dtype)).hash for x in forms for dtype in (x.dtype, torch.bfloat16, torch.float16)}
        modules |= {names[code].rpartition(".")[0] for code in hashes & names.keys()}
        loaded += bool(hashes & names.keys())
    return modules, loaded, len(slots)


@torch.inference_mode()
def _first_hidden_state(
    trace: Trace, modules: set[str], speculator: Speculator, base: nn.Module
) -> tuple[str, int] | None:
    """Which hidden state the first of these modules was given, and how many positions before the last token's."""
    if not trace.tokens or max(trace.tokens) >= speculator.vocab_size:
        return None
    tokens, dtype = torch.tensor(trace.tokens, device=base.device), next(speculator.parameters()).dtype
    first, expected = speculator.start, {}
    if speculator.reads_sequence:
        first = lambda state: DraftState(state, None, 0)  # noqa: E731
    for source in (speculator.hidden_state_source,) if speculator.reads_sequence else HIDDEN_STATES:
        with Target(base, source) as target:
            states, _ = target.read(tokens)
        for back, state in enumerate(states.flip(0)[:3]):
            expected[source, back] = stats_of(first(state[None].to(dtype)).output)
    (count,) = {state.count for state in expected.values()}
    for call in trace.calls:
        given = [x for x in call.inputs if x.is_float and x.count == count]
        if call.name in modules and given:
            distances = {key: min(distance(x, state) for x in given) for key, state in expected.items()}
            nearest = min(distances, key=lambda key: distances[key])
            if distances[nearest] < SAME_STATE:
                return nearest
    return None


def hidden_state(context: DiagnosisContext) -> Finding:
    """The state after the final norm against the one before it, and a copy of the norm against the base model's."""
    speculator, reads = context.speculator, context.speculator.hidden_state_source
    if reads not in HIDDEN_STATES:
        return f"it reads {reads}, which has no other form", ""
    (other,) = set(HIDDEN_STATES) - {reads}
    try:
        rates = {source: context.answers.measure(speculator, hidden_state_source=source) for source in (reads, other)}
    except UserError as error:
        return str(error), None
    evidence = ", ".join(f"{rate} accepted when fed {source}" for source, rate in rates.items())
    for norm in speculator.modules():
        if isinstance(norm, FrozenNorm):
            expected = FrozenNorm(len(norm.weight)).requires_grad_(False).to(norm.weight.device)
            expected.copy_from(final_norm(context.base))
            difference = float((norm.weight.float() - expected.weight).norm() / expected.weight.norm())
            evidence += f"; its norm is {difference:.1e} from the base's"
            if difference > NORM_DIFFERENCE:
                return evidence, "its copy of the base's final norm is another: copy it from this base"
    advice = f"it was trained on {other} states and is fed {reads}: train it on the state that is served"
    return evidence, advice if rates[other].explains(rates[reads]) else ""


def alignment(context: DiagnosisContext) -> Finding:
    """Targets one position off, and tokens if it reads any."""
    token_shifts = SHIFTS if context.speculator.reads_tokens else (0,)
    rates = {
        (token, target): context.answers.measure(context.speculator, token_shift=token, target_shift=target)
        for token in token_shifts
        for target in SHIFTS
    }
    parts = [f"{rates[0, s]} with targets shifted by {s:+d}" for s in SHIFTS if s]
    parts += [f"{rates[s, 0]} with tokens shifted by {s:+d}" for s in token_shifts if s]
    evidence = f"{context.served} as aligned, {', '.join(parts)}"
    best = max(rates, key=lambda shift: rates[shift].rate)
    if not rates[best].explains(context.served):
        return evidence, ""
    shifted = [f"{part} by {s:+d}" for part, s in zip(("tokens", "targets"), best, strict=True) if s]
    evidence += f"; best {rates[best]} with {' and '.join(shifted)}"
    return evidence, f"it was trained with its {' and its '.join(shifted)} off: correct that shift, and train again"


def number_type(context: DiagnosisContext) -> Finding:
    """The types that it is served in against float32. Each is loaded again: a narrow type rounds the weights too."""
    own = str(next(context.speculator.parameters()).dtype).removeprefix("torch.")
    if context.speculator.shared_layers is not None:
        return f"it runs on the base's decoder layers, in their type, {own}", ""
    rates = {own: context.served}
    for dtype in sorted({"float32", "bfloat16"} - {own}, reverse=True):
        other = load_speculator(context.info.directory, device=context.base.device, dtype=getattr(torch, dtype))
        rates[dtype] = context.answers.measure(other.eval())
    evidence = ", ".join(f"{rate} in {dtype}" for dtype, rate in rates.items())
    coarse = next((dtype for dtype, rate in rates.items() if rates["float32"].explains(rate)), None)
    advice = f"run it in float32: {coarse} is too coarse for it" if coarse else ""
    return f"{evidence}; on disk it is {context.info.dtype}", advice


def scale_input(context: DiagnosisContext) -> Finding:
    """The opposite of the setting."""
    config, speculator = context.info.config, context.speculator
    if "scale_input" not in config.read_settings(config.method):
        return f"{config.method} has no such setting", ""
    opposite = dataclasses.replace(config, scale_input=not config.scale_input)
    shape = {"hidden_size": speculator.hidden_size, "vocab_size": speculator.vocab_size}
    other = build_speculator(opposite, **shape, device="meta")
    other.load_state_dict(speculator.state_dict(), assign=True)
    rate = context.answers.measure(other)
    evidence = f"{context.served} with {config.scale_input}, {rate} with {opposite.scale_input}"
    value = str(opposite.scale_input).lower()
    advice = f"set scale_input={value} in its config.json: its weights were trained with it"
    return evidence, advice if rate.explains(context.served) else ""


def learning_rate(context: DiagnosisContext) -> Finding:
    """Whether training still changed the weights when it saved the checkpoint."""
    info = context.info
    advice = "raise optim.lr or trainer.total_training_steps, and continue from it with model.speculator.path"
    training = info.provenance.get("training", {})
    step, total = training.get("step"), training.get("total_steps")
    if training.get("lr") == 0:
        return "optim.lr was 0", advice
    previous = _previous_checkpoint(info)
    if previous is not None:
        before, after = read_weights(previous), read_weights(info)
        if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after):
            names = f"{previous.directory.name} and {info.directory.name}"
            return f"{names} hold the same weights: no step between them changed one", advice
    try:
        state = torch.load(info.directory / STATE_DIRECTORY / "lr_scheduler.pt", weights_only=True)
        rate = max(float(rate) for rate in state["_last_lr"])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError):
        return f"no {STATE_DIRECTORY} in it" + (f", step {step} of {total}" if step is not None else ""), None
    stopped = rate == 0 and step is not None and total is not None and step < total
    return f"the learning rate was {rate:.1e} at step {step} of {total}", advice if stopped else ""


def _previous_checkpoint(info: CheckpointInfo) -> CheckpointInfo | None:
    """The run's checkpoint before this one."""
    directory = info.directory.resolve()
    steps = {path: int(m[1]) for path in directory.parent.iterdir() if (m := STEP_DIRECTORY.match(path.name))}
    earlier = [path for path, step in steps.items() if step < steps.get(directory, 0)]
    try:
        return read_checkpoint_info(max(earlier, key=steps.get)) if earlier else None
    except UserError:
        return None


def data(context: DiagnosisContext) -> Finding:
    """Acceptance on the training data against the given prompts."""
    evidence = f"{context.served} on the base's answers to the prompts given"
    if context.training_answers is None or context.training_text is None:
        return f"{evidence}; its training data are not available (--train-data FILE)", None
    texts = (context.training_answers, context.training_text)
    answers, text = (aligned.measure(context.speculator) for aligned in texts)
    evidence += f", {answers} on its answers to training prompts, {text} on the training text itself"
    if answers.explains(context.served):
        return evidence, "train on data like the prompts that are served"
    advice = "train on the base's own answers (verl-speculator regenerate): the base would not write this text"
    return evidence, advice if text.explains(answers) else ""


def depths(context: DiagnosisContext) -> Finding:
    """The first depth at which the chain of drafts breaks."""
    rates = context.served.depths
    shares = ", ".join("–" if math.isnan(rate) else f"{rate:.0%}" for rate in rates)
    evidence = f"accepted of what reached each depth: {shares}"
    if rates[0] < MARGIN:
        advice = "even the first draft is wrong: train longer, or with a larger optim.lr (train/depth0_accuracy)"
        return evidence, advice
    for k, (before, rate) in enumerate(pairwise(rates), 1):
        if rate < DEPTH_DROP * before:
            advice = f"draft {k} tokens (--draft-length {k}), and look at what only depth {k} has: its head, its "
            return f"{evidence}; the chain breaks at depth {k}", f"{advice}projection"
    return evidence, ""


def heads(context: DiagnosisContext) -> Finding:
    """The checkpoint's depths against other keys that engines read in its config.json, and against the draft length."""
    count, num_draft = context.info.config.n_predict, context.num_draft
    evidence = f"n_predict={count}, and the file's tensors are those of {count} depths"
    content = json.loads((context.info.directory / CONFIG_FILE).read_text())
    for key in HEAD_COUNTS:
        value = content.get(key, count)
        number = value if isinstance(value, int) else len(value)
        if number != count:
            evidence += f"; its {key} says {number}, and serving engines read that"
            return evidence, f"set {key} in its config.json for {count}"
    if num_draft is None:
        return evidence, ""
    advice = f"have the engine draft {count} tokens (num_speculative_tokens), or train with n_predict={num_draft}"
    return f"{evidence}; {num_draft} tokens are drafted a round", advice if num_draft > count else ""


def draft_vocabulary(context: DiagnosisContext) -> Finding | None:
    """The share of the answers' tokens that the speculator can draft."""
    tokens = context.speculator.draft_tokens
    if tokens is None:
        return None
    answers = [t for ids, mask in context.answers.texts for t, is_answer in zip(ids, mask, strict=True) if is_answer]
    covered = sum(map(set(tokens.tolist()).__contains__, answers)) / max(len(answers), 1)
    evidence = f"{covered:.1%} of the answers' tokens are among the {len(tokens)} that can be drafted"
    advice = "train with a larger model.speculator.draft_vocab_size, counted on answers like these"
    return evidence, advice if covered < COVERAGE else ""


CHECKS: dict[str, Callable[[DiagnosisContext], Finding | None]] = {
    "trained at all": trained_at_all,
    "trained for this base": trained_for_this_base,
    "serving": serving,
    "hidden state": hidden_state,
    "alignment": alignment,
    "number type": number_type,
    "scale_input": scale_input,
    "learning rate": learning_rate,
    "data": data,
    "depths": depths,
    HEADS: heads,
    "draft vocabulary": draft_vocabulary,
}


@dataclass(frozen=True)
class DiagnosisReport:
    """All checks, and the acceptance as served; None if the checkpoint does not load."""

    accepted: Acceptance | None
    checks: list[Check]

    @property
    def faults(self) -> list[Check]:
        """The checks that found a fault."""
        return [check for check in self.checks if check.status == FAULT]

    @property
    def recommendation(self) -> str:
        """What to do about the first fault."""
        for check in self.faults:
            return f"{check.name}: {check.advice}."
        return "Nothing is wrong with the checkpoint: train longer, or on more data like what is served."


def diagnose(settings: DiagnosisSettings) -> DiagnosisReport:
    """Load a checkpoint and its base model, and run every check.

    Raises:
        UserError: for a file, a base model or a setting that cannot be used; before the base model is loaded.
    """
    import_external(settings.external_lib)
    base, num_draft = settings.base, settings.num_draft
    info = read_checkpoint_info(settings.checkpoint)
    info.check_base(*base_shape(base))
    engine_trace = read_trace(settings.rollout_trace) if settings.rollout_trace else None
    if num_draft is None and engine_trace is not None and "drafts" in engine_trace.notes:
        num_draft = len(engine_trace.notes["drafts"])
    given_prompts = _sample_prompts(settings.prompts, settings.num_prompts)
    files = (Path(file).expanduser() for file in info.provenance.get("data", {}).get("train_files", []))
    train_data = settings.train_data or next((file for file in files if file.is_file()), None)
    training_prompts = _sample_prompts(train_data, settings.num_prompts) if train_data else []
    device = choose_device(settings.device)
    placement = {"device": device, "dtype": choose_dtype(settings.dtype, device)}
    try:
        read_weights(info)
    except UserError as error:
        if "does not fit its" not in str(error):
            raise
        advice = "take both files from the same checkpoint: its heads are not those that n_predict calls for"
        return DiagnosisReport(None, [Check(HEADS, str(error), advice)])
    tokenizer, model = load_tokenizer(base), load_base(base, **placement)
    speculator = load_speculator(settings.checkpoint, **placement).requires_grad_(False).eval()
    ends = end_token_ids(tokenizer, model.generation_config)
    training_answers = training_text = None
    with progress_bar() as progress:

        def answer(prompts: list[Prompt], description: str) -> AlignedTexts:
            ids = (prompt_ids(prompt, tokenizer) for prompt in progress.track(prompts, description=description))
            return AlignedTexts(model, greedy_answers(model, ids, settings.max_new_tokens, ends), ends)

        answers = answer(given_prompts, "prompts")
        if training_prompts:
            training_answers = answer(training_prompts, "training prompts")
            texts = read_texts(train_data, tokenizer)
            chosen = evenly_spaced(len(texts), settings.num_prompts)
            training_text = AlignedTexts(model, [texts[i] for i in chosen], ends)
    context = DiagnosisContext(
        info, speculator, model, base, answers, training_answers, training_text, num_draft, engine_trace
    )
    if not context.served.positions:
        raise UserError(
            f"prompts={settings.prompts}: the base's answers are shorter than {speculator.n_predict + 1} tokens, so "
            "there is no position to draft from; expected other prompts, or a larger --max-new-tokens"
        )
    findings = ((name, check(context)) for name, check in CHECKS.items())
    return DiagnosisReport(context.served, [Check(name, *found) for name, found in findings if found is not None])


def _sample_prompts(path: Path, count: int) -> list[Prompt]:
    prompts = read_prompts(path)
    return [prompts[i] for i in evenly_spaced(len(prompts), count)]
