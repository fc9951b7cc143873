"""The models that are traced while they draft, and the experiments on them: `bisect` replays one module with the
arguments that a trace kept, `solo_vs_pair` compares a draft alone with the same draft after other models."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from verl_speculator.decoding.drafters import SpeculatorDrafter
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.target import Target
from verl_speculator.diagnose.comparison import Comparison, compare
from verl_speculator.diagnose.tensor_stats import TOLERANCES
from verl_speculator.diagnose.trace_file import Trace, from_structure, read_trace
from verl_speculator.diagnose.tracer import named_tensors, select, trace
from verl_speculator.models import Speculator
from verl_speculator.utils.errors import UserError

COPIES = 4
ALONE = "alone"


def parse_tokens(text: str) -> list[int]:
    """Token ids written as "5,9,23".

    Raises:
        UserError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f'tokens={text}: expected token ids joined by commas, such as "5,9,23"')
    return [int(part) for part in parts]


def import_external(name: str | None) -> None:
    """Import custom architectures, kernels or patches, as verl's `model.external_lib` does.

    Args:
        name: of a module, or of a Python file; None for nothing.

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
    """A base model and its speculator as one module, so that one trace holds both.

    Args:
        base: of Hugging Face.
        speculator: of this base model.
    """

    def __init__(self, base: nn.Module, speculator: Speculator) -> None:
        super().__init__()
        self.base, self.speculator = base, speculator
        self.drafter = SpeculatorDrafter(speculator, SamplingPolicy(), sampled=False)

    def forward(self, input_ids: Tensor, count: int) -> dict[str, Tensor]:
        """Read the tokens [N], take the base model's next one, and draft after it.

        Returns:
            `token` [1], `drafts` [count], and `logits` [1, V] of the base model.
        """
        with Target(self.base, self.speculator.hidden_state_source) as target:
            hidden, logits = target.read(input_ids, last_only=True)
        token = logits.argmax(-1)
        drafts = self.drafter.propose(hidden, token, None, count).tokens
        return {"token": token, "drafts": drafts, "logits": logits}


@dataclass(frozen=True)
class TracedModel:
    """A causal language model that drafts by itself with a KV cache of its own, or a `BaseWithSpeculator`."""

    module: nn.Module

    @torch.no_grad()
    def draft(self, tokens: list[int], count: int) -> list[int]:
        """`count` greedy tokens after these; a speculator drafts at most `n_predict`, after the base's next token."""
        if isinstance(self.module, BaseWithSpeculator):
            ids = torch.tensor(tokens, device=self.module.base.device)
            return self.module(ids, min(count, self.module.speculator.n_predict))["drafts"].tolist()
        ids, drafts = torch.tensor(tokens, device=self.module.device), []
        with Target(self.module) as target:
            for _ in range(count):
                _, logits = target.read(ids)
                ids = logits[-1:].argmax(-1)
                drafts.append(int(ids))
        return drafts


def load_traced_model(
    *, model: str | None, base: str | None, speculator: str | None, device: str, dtype: str, tokens: list[int]
) -> TracedModel:
    """Load what the command line names: a model, or a base model with a speculator.

    Raises:
        UserError: for neither or both, a model that cannot be loaded, or tokens outside of its vocabulary.
    """
    if (model is None) == (base is None) or (base is None) != (speculator is None):
        raise UserError("model: expected --model, or --base together with --speculator")
    from verl_speculator.base_model.loading import base_shape, choose_device, choose_dtype, load_base
    from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info

    width, vocabulary = base_shape(model or base)
    unknown = [token for token in tokens if token >= vocabulary]
    if unknown:
        raise UserError(f"tokens: {unknown[0]} is outside of the model's vocabulary; expected ids below {vocabulary}")
    if speculator is not None:
        read_checkpoint_info(speculator).check_base(width, vocabulary)
    device = choose_device(device)
    torch_dtype = choose_dtype(dtype, device)
    loaded = load_base(model or base, device=device, dtype=torch_dtype)
    if speculator is None:
        return TracedModel(loaded)
    draft = load_speculator(speculator, device=device, dtype=torch_dtype).requires_grad_(False)
    return TracedModel(BaseWithSpeculator(loaded, draft).eval())


@dataclass(frozen=True)
class Variant:
    """One way to run a module again.

    Attributes:
        module: name.
        name: what was done.
        against: what the output is compared with.
        distance: relative difference of the outputs; None if it could not run.
        changes: whether that is more than rounding.
        note: why it could not run, or which arguments the trace could not keep.
    """

    module: str
    name: str
    against: str
    distance: float | None
    changes: bool
    note: str = ""


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
    kept_names = {trace.calls[kept["call"]].name for kept in trace.kept}
    if root not in kept_names:
        names = ", ".join(sorted(kept_names)[:3]) or "nothing"
        raise UserError(
            f"module={name}: {trace.path} kept no input of {root} (it kept {names}); expected --keep {root}"
        )
    replays = {}
    for kept in trace.kept:
        recorded = trace.calls[kept["call"]]
        if recorded.index == call and (recorded.name == root or recorded.name.startswith(f"{root}.")):
            replays[recorded.name] = kept
    if root not in replays:
        count = sum(recorded.name == root for recorded in trace.calls)
        raise UserError(f"call={call}: {root} was called {count} times; expected a number below that")
    tensors = trace.kept_tensors()
    variants: list[Variant] = []
    for module, kept in replays.items():
        if "outputs" in kept and module in modules:
            replay = _Replay(modules[module], module, kept, tensors, tolerance)
            variants += replay.variants(disturb if module == root else None)
    return Bisection(_bisection_verdict(root, variants), tuple(variants))


class _Replay:
    """One module with the arguments and the output of one call."""

    def __init__(
        self, module: nn.Module, name: str, kept: dict[str, Any], tensors: dict[str, Tensor], tolerance: float | None
    ) -> None:
        lost: list[str] = []
        arguments = from_structure(kept["inputs"], tensors, lost)
        self.recorded = from_structure(kept["outputs"], tensors, [])
        self.module, self.name = module, name
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.arguments = tree_map_only(Tensor, lambda t: t.to(device), arguments)
        self.note = f"without its {', '.join(dict.fromkeys(lost))}" if lost else ""
        types = {str(t.dtype).removeprefix("torch.") for _, t in named_tensors("", self.recorded)}
        self.tolerance = tolerance or max((TOLERANCES.get(dtype, 0.0) for dtype in types), default=0.0)

    @torch.no_grad()
    def _run(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        copied = tree_map_only(Tensor, torch.clone, arguments)  # some modules write to their arguments
        return module(*copied["args"], **copied["kwargs"])

    def variants(self, disturb: Callable[[], object] | None) -> Iterator[Variant]:
        """Run the module again in every way."""
        alone = self._run(self.module, self.arguments)
        yield self._compared("alone, fresh", "the recorded output", alone, self.recorded)
        again = self._run(self.module, self.arguments)
        yield self._compared("a second time", "the first time", again, alone)
        yield self._attempt("in float64", "its own type", self._in_float64, alone)
        yield self._attempt(f"in a batch of {COPIES}", "alone", self._in_batch, alone)
        if disturb is not None:  # last, because its effect may stay
            disturb()
            after = self._run(self.module, self.arguments)
            yield self._compared("after another model has run", "fresh", after, alone)

    def _in_float64(self) -> Any:
        module = copy.deepcopy(self.module).double()
        for part in module.modules():  # transformers' grouped matrix product of experts has no float64
            if hasattr(getattr(part, "config", None), "_experts_implementation"):
                part.config = copy.copy(part.config)
                part.config._experts_implementation = "eager"
        return self._run(
            module, tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.arguments)
        )

    def _in_batch(self) -> Any:
        count = next(t.shape[0] for _, t in named_tensors("", self.arguments) if t.dim())

        def repeat(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != count:
                return tensor
            # With equal copies a mean over the batch would change nothing.
            others = [tensor.roll(i, -1) if tensor.is_floating_point() else tensor for i in range(1, COPIES)]
            return torch.cat([tensor, *others])

        output = self._run(self.module, tree_map_only(Tensor, repeat, self.arguments))
        return tree_map_only(Tensor, lambda t: t[:count] if t.dim() and t.shape[0] == COPIES * count else t, output)

    def _attempt(self, name: str, against: str, run: Callable[[], Any], other: Any) -> Variant:
        try:
            return self._compared(name, against, run(), other)
        except (RuntimeError, TypeError, ValueError, LookupError, StopIteration) as error:
            note = f"could not run: {' '.join(str(error).split())[:80]}"
            return Variant(self.name, name, against, None, False, note)

    def _compared(self, name: str, against: str, output: Any, other: Any) -> Variant:
        pairs = zip(named_tensors("", output), named_tensors("", other), strict=False)
        distance = max((relative_difference(x, y) for (_, x), (_, y) in pairs), default=0.0)
        return Variant(self.name, name, against, distance, distance > self.tolerance, self.note)


def relative_difference(x: Tensor, y: Tensor) -> float:
    """‖x − y‖ / ‖y‖; infinite for integers that differ, and for different shapes."""
    if x.shape != y.shape:
        return math.inf
    if torch.equal(x, y.to(x)):
        return 0.0
    if not (x.is_floating_point() and y.is_floating_point()):
        return math.inf
    x, y = x.double().cpu(), y.double().cpu()
    difference = (x - y).norm().item()
    return difference / max(y.norm().item(), 1e-300) if math.isfinite(difference) else math.inf


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
    """The result of `solo_vs_pair`.

    Attributes:
        verdict: one sentence.
        tokens: the draft tokens of every run, `alone` first.
        comparisons: of the run alone with every other.
    """

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
