"""Answers of the base's own for the prompts of a parquet: what a speculator is judged against."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from verl_speculator.base_model.loading import UNQUANTIZED
from verl_speculator.data.conversations import Conversation, PromptFile
from verl_speculator.data.generation_backends import Backend, HuggingFaceBackend, VllmBackend
from verl_speculator.data.shards import Shards
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError, nearest
from verl_speculator.utils.options import (
    BaseModel,
    Device,
    Dtype,
    MaxNewTokens,
    Option,
    Temperature,
    TopK,
    TopP,
    check_minimums,
)
from verl_speculator.utils.process import progress_bar, spread

if TYPE_CHECKING:
    import torch


BACKENDS = ("hf", "vllm")


def _read_vllm_args(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f'vllm_args={text}: expected a JSON object such as {{"tensor_parallel_size": 4}}')
    return value


@dataclass(frozen=True)
class RegenerateSettings:
    """Everything that decides what is written; all of it is recorded."""

    base: BaseModel
    data: Annotated[Path, Option("parquet with a column messages, turns or prompt")]
    out: Annotated[Path, Option("parquet to write; the same command goes on after a kill")]
    backend: Annotated[str, Option("hf (Hugging Face's generate) or vllm")] = "hf"
    max_new_tokens: MaxNewTokens = 512
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Annotated[int, Option("of sampling", minimum=0)] = 0
    # The chat template writes an end token behind an answer that did not end, too.
    keep_unfinished: Annotated[
        bool, Option("keep rows whose answer did not end; training sees an end there", flag="--keep-unfinished")
    ] = False
    num_rows: Annotated[int, Option("rows of the file, at even distances; 0 for all", minimum=0)] = 0
    batch_size: Annotated[int, Option("prompts at a time (hf)", minimum=1)] = 16
    shard_rows: Annotated[int, Option("rows that a kill costs at most", minimum=1)] = 512
    dtype: Dtype = "auto"
    device: Device = "auto"
    vllm_args: Annotated[
        dict[str, Any],
        Option('JSON of vllm.LLM\'s, such as {"tensor_parallel_size": 4}', parse=_read_vllm_args),
    ] = field(default_factory=dict)
    overwrite: Annotated[bool, Option("replace the file, and shards of other settings", flag="--overwrite")] = False

    def __post_init__(self) -> None:
        self.policy  # noqa: B018
        check_minimums(self)
        if self.backend not in BACKENDS:
            hint = nearest(self.backend, BACKENDS)
            raise UserError(f"backend={self.backend}: expected {' or '.join(BACKENDS)}{hint}")
        if self.backend == "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise UserError("backend=vllm: vLLM is not installed; expected `pip install vllm`, or --backend hf")
            if self.device != "auto":
                raise UserError(f"device={self.device}: vLLM chooses its device itself, expected auto")
        elif self.vllm_args:
            raise UserError(f"vllm_args={json.dumps(self.vllm_args)}: only for --backend vllm")

    @property
    def policy(self) -> SamplingPolicy:
        """Temperature, top-p and top-k."""
        return SamplingPolicy(self.temperature, self.top_p, self.top_k)

    def check_output(self) -> None:
        """Refuse an output that is there already or cannot be written, without making anything."""
        if self.out.is_dir():
            raise UserError(f"out={self.out}: a directory, expected a name for a parquet file")
        if self.out.suffix != ".parquet":
            raise UserError(f"out={self.out}: expected a name that ends in .parquet")
        if self.out.exists() and self.data.exists() and self.out.samefile(self.data):
            raise UserError(f"out={self.out}: is the data itself, expected another file")
        if self.out.exists() and not self.overwrite:
            raise UserError(f"out={self.out}: exists already; expected a new name, or --overwrite")
        check_writable(f"out={self.out}", self.out.parent)


UNFINISHED, TOO_LONG, TOOLS = "unfinished", "too_long", "tools"
REASONS = {
    UNFINISHED: "answer did not end within max_new_tokens",
    TOO_LONG: "prompt does not fit the base",
    TOOLS: "calls or offers tools",
}


@dataclass
class AcceptanceStats:
    """What became of some rows.

    Attributes:
        rows: that were read.
        answers: that were written, in rows that are kept.
        tokens: of these, end tokens not counted.
        unfinished: of these, the answers that did not end.
        dropped: rows that are not written, by the reason (one of REASONS).
    """

    rows: int = 0
    answers: int = 0
    tokens: int = 0
    unfinished: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: AcceptanceStats) -> None:
        """Add what became of other rows."""
        for name in ("rows", "answers", "tokens", "unfinished"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, rows in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(rows)

    @property
    def written(self) -> int:
        """Rows that are written."""
        return self.rows - sum(map(len, self.dropped.values()))

    def summary(self) -> list[str]:
        """Lines for a reader: what is written, and what was dropped and why."""
        lines = [f"{self.written} of {self.rows} rows, {self.answers} answers of {self.tokens} tokens"]
        if self.unfinished:
            lines.append(f"{self.unfinished} answers did not end within max_new_tokens and are kept")
        for reason, rows in self.dropped.items():
            named = ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
            lines.append(f"{len(rows)} dropped, {REASONS[reason]}: row{'s'[: len(rows) > 1]} {named}")
        return lines


def regenerate(settings: RegenerateSettings) -> AcceptanceStats:
    """Write `settings.out`: the rows of `settings.data` with answers of the base's own (docs/regenerate.md).

    A run that was killed goes on where it was.

    Returns:
        What became of the rows.

    Raises:
        UserError: for a setting, a file or a base that cannot be used; before the base is loaded wherever it can be
            known by then. Also if no row is left.
    """
    settings.check_output()
    source = PromptFile.open(settings.data)

    # These load torch, which no complaint about a setting or the file should wait for.
    from verl_speculator.base_model.loading import choose_device, choose_dtype, load_tokenizer

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    tokenizer = load_tokenizer(settings.base)
    ends = _end_tokens(settings.base, tokenizer)
    if not ends and not settings.keep_unfinished:
        raise UserError(
            f"base={settings.base}: names no end token, so that no answer ends; expected --keep-unfinished, or an "
            "eos_token_id in its generation_config.json"
        )
    rows = spread(source.table.num_rows, settings.num_rows)
    parts = [rows[i : i + settings.shard_rows] for i in range(0, len(rows), settings.shard_rows)]
    shards = Shards(settings.out, len(parts))
    go_on = shards.check(_identity(settings, device, dtype, tokenizer, ends), overwrite=settings.overwrite)
    with progress_bar() as progress:
        reading = progress.add_task("checking rows", total=len(rows))
        waiting = []
        for part in parts:
            waiting.append(_check(source, part, tokenizer, go_on=go_on))
            progress.advance(reading, len(part))
        missing = shards.missing() if go_on else list(range(len(parts)))
        if missing:
            backend = _load(settings, device, dtype, tokenizer, ends)
            # Anew, since a base from the hub has a fingerprint only once it is here.
            shards.begin(_identity(settings, device, dtype, tokenizer, ends), go_on=go_on)
            done = sum(waiting) - sum(waiting[i] for i in missing)
            task = progress.add_task(f"{settings.data.name} (answers)", total=sum(waiting), completed=done)
            for i in missing:
                talks = list(source.talks(parts[i]))
                account = _answer(talks, backend, tokenizer, settings, lambda n: progress.advance(task, n))
                kept = [talk for talk in talks if not talk.open]
                shards.write(i, source.answered(kept), asdict(account))
    total = AcceptanceStats()
    for found in shards.accounts():
        total.add(AcceptanceStats(**found))
    if not total.written:
        shards.remove()
        advice = f"; expected a larger --max-new-tokens than {settings.max_new_tokens}, or --keep-unfinished"
        reasons = "; ".join(total.summary()[1:]) + (advice if UNFINISHED in total.dropped else "")
        raise UserError(f"data={settings.data}: no row is left: {reasons}")
    shards.merge(source.schema, _provenance(settings, device, dtype, tokenizer, ends, total))
    return total


def _check(source: PromptFile, rows: list[int], tokenizer: Any, *, go_on: bool) -> int:
    """How many answers some rows wait for, once it is sure that the chat template takes them.

    Rows that are being gone on with have been through this.
    """
    from verl_speculator.base_model.chat_template import tokenize_prompt

    answers = 0
    for talk in source.talks(rows):
        answers += len(talk.open)
        if not go_on and not talk.calls_tools:
            try:
                tokenize_prompt(tokenizer, talk.prompt(talk.open[-1]))
            except UserError as error:
                raise UserError(f"data={source.path}, row {talk.row}: {error}") from None
    return answers


def _load(
    settings: RegenerateSettings, device: str, dtype: torch.dtype, tokenizer: Any, ends: tuple[int, ...]
) -> Backend:
    if settings.backend == "vllm":
        return VllmBackend(
            settings.base,
            dtype=dtype,
            policy=settings.policy,
            ends=ends,
            seed=settings.seed,
            arguments=settings.vllm_args,
        )
    return HuggingFaceBackend(
        settings.base,
        device=device,
        dtype=dtype,
        policy=settings.policy,
        ends=ends,
        pad=tokenizer.pad_token_id,
        batch_size=settings.batch_size,
    )


def _answer(
    talks: list[Conversation],
    backend: Backend,
    tokenizer: Any,
    settings: RegenerateSettings,
    advance: Callable[[int], None],
) -> AcceptanceStats:
    """Answer the conversations of a shard, turn by turn; those that are dropped keep an open place."""
    from verl_speculator.base_model.chat_template import tokenize_prompt

    account = AcceptanceStats(rows=len(talks))
    said: dict[int, list[tuple[int, bool]]] = {talk.row: [] for talk in talks}

    def drop(talk: Conversation, reason: str) -> None:
        account.dropped.setdefault(reason, []).append(talk.row)
        said.pop(talk.row)
        advance(len(talk.open))

    due = talks
    while due:
        asked: list[tuple[Conversation, list[int]]] = []
        for talk in due:
            if talk.calls_tools:
                drop(talk, TOOLS)
                continue
            try:
                ids = tokenize_prompt(tokenizer, talk.prompt())
            except UserError as error:
                raise UserError(f"data={settings.data}, row {talk.row}: {error}") from None
            if backend.limit is not None and len(ids) >= backend.limit:
                drop(talk, TOO_LONG)
            else:
                asked.append((talk, ids))
        answers = backend.generate(
            [ids for _, ids in asked],
            max_new_tokens=settings.max_new_tokens,
            seeds=[_seed(settings.seed, talk.row, talk.open[0]) for talk, _ in asked],
        )
        for i, tokens, finished in answers:
            talk = asked[i][0]
            if not finished and not settings.keep_unfinished:
                drop(talk, UNFINISHED)
                continue
            # Cleaning up would put other spaces between the words than the base did.
            talk.answer(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            said[talk.row].append((len(tokens), finished))
            advance(1)
        due = [talk for talk, _ in asked if talk.row in said and talk.open]
    for rows in account.dropped.values():
        rows.sort()
    for answered in said.values():
        account.answers += len(answered)
        account.tokens += sum(count for count, _ in answered)
        account.unfinished += sum(not finished for _, finished in answered)
    return account


def _seed(seed: int, row: int, place: int) -> int:
    """For one answer, so that what is drawn does not hang on where a run was interrupted."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {place}".encode()).digest()[:4])


def _end_tokens(base: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a turn, without loading the base."""
    from transformers import AutoConfig

    from verl_speculator.base_model.chat_template import end_token_ids

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"base={base}: no model there: {' '.join(str(error).split())[:200]}") from None
    return end_token_ids(tokenizer, UNQUANTIZED.read_generation_config(base, config))


def _identity(
    settings: RegenerateSettings, device: str, dtype: torch.dtype, tokenizer: Any, ends: tuple[int, ...]
) -> dict[str, Any]:
    """What must be the same for shards to belong together."""
    from verl_speculator.checkpoint.provenance import weights_fingerprint

    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    identity = {
        "base": weights_fingerprint(settings.base) or settings.base,
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:32],
        "data": _sha256(settings.data),
        "device": device.split(":")[0],
        "dtype": str(dtype).removeprefix("torch."),
        "end_tokens": list(ends),
    }
    own = asdict(settings)
    for name in ("base", "data", "out", "device", "dtype", "overwrite"):
        own.pop(name)
    # Greedily a batch decides nothing but rounding, and a smaller one may be what lets a run go on; vLLM asks for none.
    if settings.policy.greedy or settings.backend == "vllm":
        own.pop("batch_size")
    return identity | own


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _provenance(
    settings: RegenerateSettings,
    device: str,
    dtype: torch.dtype,
    tokenizer: Any,
    ends: tuple[int, ...],
    total: AcceptanceStats,
) -> dict[str, Any]:
    """What the result says of itself."""
    from importlib import metadata

    from verl_speculator.checkpoint.provenance import git_commit, hardware, versions, weights_fingerprint

    identity = _identity(settings, device, dtype, tokenizer, ends)
    found = versions() | ({"vllm": metadata.version("vllm")} if settings.backend == "vllm" else {})
    return {
        "command": "regenerate",
        "base": settings.base,
        "base_fingerprint": weights_fingerprint(settings.base),
        "data": str(settings.data),
        "data_sha256": identity.pop("data"),
        "temperature": settings.temperature,
        "seed": settings.seed,
        "settings": {k: v for k, v in identity.items() if k != "base"} | {"batch_size": settings.batch_size},
        "counts": {
            "rows": total.rows,
            "rows_written": total.written,
            "answers": total.answers,
            "answer_tokens": total.tokens,
            "unfinished": total.unfinished,
            "dropped": {reason: len(rows) for reason, rows in total.dropped.items()},
        },
        "dropped_rows": total.dropped,
        "versions": found,
        "commit": git_commit(),
        "hardware": hardware(device),
        "date": datetime.date.today().isoformat(),
    }
