"""Answers of the base's own for the prompts of a parquet: what a speculator is judged against."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_form import AS_IT_LIES
from verl_speculator.data.backends import Backend, HuggingFaceBackend, VllmBackend
from verl_speculator.data.regenerate_settings import RegenerateSettings
from verl_speculator.data.shards import Shards
from verl_speculator.data.talks import Source, Talk
from verl_speculator.errors import UserError
from verl_speculator.progress import progress_bar
from verl_speculator.selection import spread

if TYPE_CHECKING:
    import torch

UNFINISHED, TOO_LONG, TOOLS = "unfinished", "too_long", "tools"
REASONS = {
    UNFINISHED: "answer did not end within max_new_tokens",
    TOO_LONG: "prompt does not fit the base",
    TOOLS: "calls or offers tools",
}


@dataclass
class Account:
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

    def add(self, other: Account) -> None:
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


def regenerate(settings: RegenerateSettings) -> Account:
    """Write `settings.out`: the rows of `settings.data` with answers of the base's own (docs/regenerate.md).

    A run that was killed goes on where it was.

    Returns:
        What became of the rows.

    Raises:
        UserError: for a setting, a file or a base that cannot be used; before the base is loaded wherever it can be
            known by then. Also if no row is left.
    """
    settings.check_output()
    source = Source.open(settings.data)

    # These load torch, which no complaint about a setting or the file should wait for.
    from verl_speculator.decoding.load import choose_device, choose_dtype, load_tokenizer

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
    total = Account()
    for found in shards.accounts():
        total.add(Account(**found))
    if not total.written:
        shards.remove()
        advice = f"; expected a larger --max-new-tokens than {settings.max_new_tokens}, or --keep-unfinished"
        reasons = "; ".join(total.summary()[1:]) + (advice if UNFINISHED in total.dropped else "")
        raise UserError(f"data={settings.data}: no row is left: {reasons}")
    shards.merge(source.schema, _provenance(settings, device, dtype, tokenizer, ends, total))
    return total


def _check(source: Source, rows: list[int], tokenizer: Any, *, go_on: bool) -> int:
    """How many answers some rows wait for, once it is sure that the chat template takes them.

    Rows that are being gone on with have been through this.
    """
    from verl_speculator.tokens import tokenize_prompt

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
    talks: list[Talk],
    backend: Backend,
    tokenizer: Any,
    settings: RegenerateSettings,
    advance: Callable[[int], None],
) -> Account:
    """Answer the conversations of a shard, turn by turn; those that are dropped keep an open place."""
    from verl_speculator.tokens import tokenize_prompt

    account = Account(rows=len(talks))
    said: dict[int, list[tuple[int, bool]]] = {talk.row: [] for talk in talks}

    def drop(talk: Talk, reason: str) -> None:
        account.dropped.setdefault(reason, []).append(talk.row)
        said.pop(talk.row)
        advance(len(talk.open))

    due = talks
    while due:
        asked: list[tuple[Talk, list[int]]] = []
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

    from verl_speculator.tokens import end_token_ids

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"base={base}: no model there: {' '.join(str(error).split())[:200]}") from None
    return end_token_ids(tokenizer, AS_IT_LIES.read_generation_config(base, config))


def _identity(
    settings: RegenerateSettings, device: str, dtype: torch.dtype, tokenizer: Any, ends: tuple[int, ...]
) -> dict[str, Any]:
    """What must be the same for shards to belong together."""
    from verl_speculator.provenance import weights_fingerprint

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
    total: Account,
) -> dict[str, Any]:
    """What the result says of itself."""
    from importlib import metadata

    from verl_speculator.provenance import git_commit, hardware, versions, weights_fingerprint

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
