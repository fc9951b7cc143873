"""The models that are traced while they draft, and the experiments on them: `bisect` replays one module with the
arguments that a trace kept, `solo_vs_pair` compares a draft alone with the same draft after other models."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from verl_speculator.base_model.loading import base_shape, choose_device, choose_dtype, load_base
from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info
from verl_speculator.decoding import GenerationOptions, speculative_generate
from verl_speculator.decoding.generate import make_decoder
from verl_speculator.diagnose import TracedModelOptions
from verl_speculator.diagnose.comparison import Comparison, compare
from verl_speculator.diagnose.module_matching import largest_distance, matching_tensors
from verl_speculator.diagnose.trace_file import TOLERANCES, Trace, from_structure, read_trace, stats_of
from verl_speculator.diagnose.tracer import named_tensors, select, trace
from verl_speculator.models import Speculator
from verl_speculator.utils.settings import UserError

COPIES = 4
ALONE = "alone"


def import_external(name: str | None) -> None:
    """Import a module or a Python file with custom architectures, kernels or patches, as verl's `model.external_lib`.

    Raises:
        UserError: if it cannot be imported.
    """
    if name is None:
        return
    path = Path(name).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise UserError(f"external-lib={name}: no such file; expected a Python file, or the name of a module")
    try:
        if not is_file:
            importlib.import_module(name)
        elif path.stem not in sys.modules:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(path.stem if is_file else name, None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"external-lib={name}: cannot be imported: {reason}") from error


class BaseWithSpeculator(nn.Module):
    """A Hugging Face base model and its speculator as one module, so that one trace holds both."""

    def __init__(self, base: nn.Module, speculator: Speculator) -> None:
        super().__init__()
        self.base, self.speculator = base, speculator

    def forward(self, input_ids: Tensor, count: int) -> dict[str, Tensor]:
        """Read the tokens [N], take the base model's next one, and draft after it.

        Returns:
            `token` [1], `drafts` [count], and `logits` [1, V] of the base model.
        """
        decoder = make_decoder(self.base, self.speculator, GenerationOptions(max_new_tokens=count))
        with decoder.target as target:
            hidden, logits = target.read(input_ids, last_only=True)
            token = logits.argmax(-1)
            following = torch.cat([input_ids[1:], token])
            drafts = decoder.drafter.propose(hidden, following, None, count, len(input_ids)).tokens
        return {"token": token, "drafts": drafts, "logits": logits}


@torch.no_grad()
def draft_tokens(model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """`count` greedy tokens after these; a speculator drafts at most `n_predict`, after the base model's next token."""
    if isinstance(model, BaseWithSpeculator):
        ids = torch.tensor(tokens, device=model.base.device)
        return model(ids, min(count, model.speculator.n_predict))["drafts"].tolist()
    return speculative_generate(model, None, tokens, max_new_tokens=count, eos_token_id=()).tokens


def load_traced_model(model: str | None, options: TracedModelOptions, tokens: list[int]) -> nn.Module:
    """Load what the command line names: a model, or a base model with a speculator.

    Raises:
        UserError: for neither or both, a model that cannot be loaded, or tokens outside of its vocabulary.
    """
    base, speculator = options.base, options.speculator
    if (model is None) == (base is None) or (base is None) != (speculator is None):
        raise UserError("model: expected --model, or --base together with --speculator")
    import_external(options.external_lib)
    width, vocabulary = base_shape(model or base)
    unknown = [token for token in tokens if token >= vocabulary]
    if unknown:
        raise UserError(f"tokens: {unknown[0]} is outside of the model's vocabulary; expected ids below {vocabulary}")
    if speculator is not None:
        read_checkpoint_info(speculator).check_base(width, vocabulary)
    device = choose_device(options.device)
    placement = {"device": device, "dtype": choose_dtype(options.dtype, device)}
    loaded = load_base(model or base, **placement)
    if speculator is None:
        return loaded
    return BaseWithSpeculator(loaded, load_speculator(speculator, **placement).requires_grad_(False)).eval()


def load_other_model(model: str, options: TracedModelOptions, tokens: list[int]) -> nn.Module:
    """Load a model without a speculator. Raises as `load_traced_model`."""
    return load_traced_model(model, replace(options, base=None, speculator=None), tokens)


@dataclass(frozen=True)
class Variant:
    """One way to run a module again.

    Attributes:
        module, name: what was run, and how.
        against: what the output is compared with.
        distance: `largest_distance` of the outputs; None if it could not run.
        changes: whether that is more than rounding.
        note: why it could not run, or which arguments the trace could not keep.
    """

    module: str
    name: str
    against: str
    distance: float | None
    changes: bool
    note: str = ""

    @property
    def effect(self) -> str:
        """ "changes it", or the note."""
        return "changes it" if self.changes else self.note


@dataclass(frozen=True)
class Bisection:
    """The result of replaying: one sentence, and a line for each variant."""

    verdict: str
    variants: tuple[Variant, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing changed the output."""
        return not any(v.changes for v in self.variants)


def bisect(
    trace: Trace,
    model: nn.Module,
    name: str,
    *,
    call: int = 0,
    disturb: Callable[[], object] | None = None,
    tolerance: float | None = None,
) -> Bisection:
    """Replay a kept module: alone, twice, in float64, in a batch, after another model; and each of its submodules.

    Args:
        trace: made with `--keep` of the module.
        model: the same model, fresh.
        name: of the module, or the end of its name.
        call: which of its calls.
        disturb: runs another model, which should change nothing.
        tolerance: the largest relative difference that rounding explains; by default that of the module's type.

    Raises:
        UserError: if the model has no such module, or the trace kept none of its calls.
    """
    modules = dict(model.named_modules())
    root = select(list(modules), [name], "module")[0]
    calls = [(trace.calls[kept["call"]], kept) for kept in trace.kept]
    if root not in (kept_names := {recorded.name for recorded, _ in calls}):
        kept = f"it kept {', '.join(sorted(kept_names)[:3]) or 'nothing'}"
        raise UserError(f"module={name}: {trace.path} kept no input of {root} ({kept}); expected --keep {root}")
    inside = f"{root}." if root else ""
    replays = {c.name: kept for c, kept in calls if c.index == call and f"{c.name}.".startswith(inside)}
    if root not in replays:
        count = sum(recorded.name == root for recorded in trace.calls)
        raise UserError(f"call={call}: {root} was called {count} times; expected a number below that")
    tensors = trace.kept_tensors()
    variants: list[Variant] = []
    for module, kept in replays.items():
        if "outputs" in kept and module in modules:
            disturbance = disturb if module == root else None
            variants += _replay(modules[module], module, kept, tensors, disturbance, tolerance)
    return Bisection(_bisection_verdict(root, variants), tuple(variants))


def _replay(
    module: nn.Module,
    name: str,
    kept: dict[str, Any],
    tensors: dict[str, Tensor],
    disturb: Callable[[], object] | None,
    tolerance: float | None,
) -> Iterator[Variant]:
    """Run a module in every way with the arguments of one call."""
    lost: list[str] = []
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    recorded = from_structure(kept["outputs"], tensors, [])
    arguments = tree_map_only(Tensor, lambda t: t.to(device), from_structure(kept["inputs"], tensors, lost))
    note = f"without its {', '.join(dict.fromkeys(lost))}" if lost else ""
    types = {str(t.dtype).removeprefix("torch.") for _, t in named_tensors("", recorded)}
    tolerance = tolerance or max((TOLERANCES.get(dtype, 0.0) for dtype in types), default=0.0)

    def run_after_disturbance() -> Any:
        disturb()
        return _run(module, arguments)

    alone = _run(module, arguments)
    attempts = [
        ("alone, fresh", "the recorded output", lambda: alone, recorded),
        ("a second time", "the first time", lambda: _run(module, arguments), alone),
        ("in float64", "its own type", lambda: _run_in_float64(module, arguments), alone),
        (f"in a batch of {COPIES}", "alone", lambda: _run_in_batch(module, arguments), alone),
    ]
    if disturb is not None:  # last, because its effect may stay
        attempts.append(("after another model has run", "fresh", run_after_disturbance, alone))
    for variant, against, attempt, reference in attempts:
        try:
            output = attempt()
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, StopIteration) as error:
            yield Variant(name, variant, against, None, False, f"could not run: {' '.join(str(error).split())[:80]}")
        else:
            stats = ([stats_of(t, path) for path, t in named_tensors("", value)] for value in (output, reference))
            difference = largest_distance(matching_tensors(*stats))
            yield Variant(name, variant, against, difference, difference > tolerance, note)


@torch.inference_mode()  # as `draft_tokens`, which may leave inference tensors in a module's buffers
def _run(module: nn.Module, arguments: dict[str, Any]) -> Any:
    copies = tree_map_only(Tensor, torch.clone, arguments)  # some modules write to their arguments
    return module(*copies["args"], **copies["kwargs"])


def _run_in_float64(module: nn.Module, arguments: dict[str, Any]) -> Any:
    module = copy.deepcopy(module).double()
    for part in module.modules():  # transformers' grouped matrix product of experts has no float64
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config = copy.copy(part.config)
            part.config._experts_implementation = "eager"
    return _run(module, tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments))


def _run_in_batch(module: nn.Module, arguments: dict[str, Any]) -> Any:
    """The first rows of the output for a batch of COPIES, of which the first is the recorded one."""
    count = next(t.shape[0] for _, t in named_tensors("", arguments) if t.dim())

    def repeat(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count:
            return tensor
        # With equal copies a mean over the batch would change nothing.
        others = [tensor.roll(i, -1) if tensor.is_floating_point() else tensor for i in range(1, COPIES)]
        return torch.cat([tensor, *others])

    output = _run(module, tree_map_only(Tensor, repeat, arguments))
    return tree_map_only(Tensor, lambda t: t[:count] if t.dim() and t.shape[0] == COPIES * count else t, output)


def _bisection_verdict(root: str, variants: list[Variant]) -> str:
    """What changes the module's output, and the innermost submodule in which it does."""
    of_root = [v for v in variants if v.module == root]
    inner = [v for v in variants if v.module != root and v.changes]
    changing = [v.name for v in of_root if v.changes]
    if not changing:
        if inner:
            return f"Nothing changes the output of {root}, though {inner[0].module} changes {inner[0].name}."
        attempts = ", nor ".join(v.name for v in of_root if v.distance is not None)
        return f"Nothing changes the output of {root}: not {attempts}."
    where = ""
    if inner:
        where = f"; of what it calls, so does that of {max(inner, key=lambda v: v.module.count('.')).module}"
    elif len(of_root) < len(variants):
        where = "; none of what it calls does, so it is its own code"
    return f"The output of {root} changes {' and '.join(changing)}{where}."


@dataclass(frozen=True)
class IsolationResult:
    """One sentence, the draft tokens of every run (`alone` first), and comparisons of the run alone with the others."""

    verdict: str
    tokens: dict[str, list[int]]
    comparisons: dict[str, Comparison]

    @property
    def agrees(self) -> bool:
        """Whether every run was the same as the one alone."""
        return all(comparison.agrees for comparison in self.comparisons.values())


def solo_vs_pair(
    draft: nn.Module,
    run: Callable[[], list[int]],
    others: Mapping[str, Callable[[], object]],
    folder: Path,
    *,
    modules: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> IsolationResult:
    """Run a draft alone, then after each of the others, and compare the traces.

    Args:
        draft: the traced module.
        run: runs it from the start, with a KV cache of its own, and returns the draft tokens.
        others: what runs first, by name; in this order, so the one that should change nothing comes first.
        folder: for the traces, `<name>.trace`.
        modules: as for `trace`.
        tolerance: as for `compare`.
    """
    tokens = {}
    for name in (ALONE, *others):
        if name != ALONE:
            others[name]()
        with trace(draft, folder / f"{name}.trace", modules=modules) as tracer:
            tokens[name] = tracer.notes["drafts"] = run()
    alone = read_trace(folder / f"{ALONE}.trace")
    comparisons = {
        name: compare(alone, read_trace(folder / f"{name}.trace"), tolerance=tolerance, under=("", ""))
        for name in others
    }
    same = [name for name, comparison in comparisons.items() if comparison.agrees]
    different = next((name for name in comparisons if name not in same), None)
    if different is None:
        drafts = ", ".join(map(str, tokens[ALONE]))
        verdict = f"The draft is the same alone and after {', '.join(others)}: it drafts {drafts} each time."
    else:
        exception = f"; after {', '.join(same)} it is" if same else ""
        cause = comparisons[different].verdict.sentence
        verdict = f"After {different} has run the draft is not the same{exception}. {cause}"
    return IsolationResult(verdict, tokens, comparisons)
