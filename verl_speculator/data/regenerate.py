"""The base model's own answers to the prompts of a parquet file: the text that its speculator will have to draft."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from verl_speculator.base_model.chat_template import tokenize_prompt
from verl_speculator.base_model.loading import BaseModelLoader
from verl_speculator.checkpoint.provenance import file_digest, git_commit, hardware, versions, weights_fingerprint
from verl_speculator.data.conversations import Conversation, PromptFile
from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.utils.atomic_io import TEMPORARY, atomic_file, check_writable, fsync
from verl_speculator.utils.process import evenly_spaced, progress_bar
from verl_speculator.utils.settings import (
    BaseModel,
    Device,
    Dtype,
    MaxNewTokens,
    Option,
    Temperature,
    TopK,
    TopP,
    UserError,
    check_minimums,
    nearest,
)

if TYPE_CHECKING:
    from verl_speculator.data.generation_backends import Backend

BACKENDS = ("hf", "vllm")
METADATA_KEY = b"verl_speculator"
UNFINISHED, TOO_LONG, TOOLS = "unfinished", "too_long", "tools"
REASONS = {
    UNFINISHED: "answer did not end within max_new_tokens",
    TOO_LONG: "prompt does not fit the base model",
    TOOLS: "calls or offers tools",
}
# Of one row: `row` with either `dropped` (of REASONS), or `answers`, their `tokens`, and how many are `unfinished`.
Record = dict[str, Any]


def _read_vllm_args(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text).items())
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f'vllm_args={text}: expected a JSON object such as {{"tensor_parallel_size": 4}}') from None


@dataclass(frozen=True)
class RegenerateSettings:
    """The options of `verl-speculator regenerate`; all of them are recorded."""

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
    batch_size: Annotated[int, Option("texts at a time (hf)", minimum=1)] = 32
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
        """Refuse an output that exists already or cannot be written, without creating anything."""
        setting = f"out={self.out}"
        if self.out.is_dir():
            raise UserError(f"{setting}: a directory, expected a name for a parquet file")
        if self.out.suffix != ".parquet":
            raise UserError(f"{setting}: expected a name that ends in .parquet")
        if self.out.exists() and self.data.exists() and self.out.samefile(self.data):
            raise UserError(f"{setting}: is the data itself, expected another file")
        if self.out.exists() and not self.overwrite:
            raise UserError(f"{setting}: exists already; expected a new name, or --overwrite")
        check_writable(setting, self.out.parent)


class AnswerCounts:
    """What became of the rows.

    Attributes:
        rows: rows of the file that were to be answered.
        written: rows that are written; `answers`, their `tokens` (without end tokens) and `unfinished` are of these.
        dropped: rows that are not written, by reason (of REASONS).
    """

    def __init__(self, records: list[Record]) -> None:
        written = [record for record in records if "dropped" not in record]
        self.rows, self.written = len(records), len(written)
        self.answers = sum(len(record["answers"]) for record in written)
        self.tokens = sum(record["tokens"] for record in written)
        self.unfinished = sum(record["unfinished"] for record in written)
        self.dropped: dict[str, list[int]] = {}
        for record in records:
            if reason := record.get("dropped"):
                self.dropped.setdefault(reason, []).append(record["row"])

    def summary(self) -> list[str]:
        """Lines for a reader: what is written, and what was dropped and why."""
        lines = [f"{self.written} of {self.rows} rows, {self.answers} answers of {self.tokens} tokens"]
        if self.unfinished:
            lines.append(f"{self.unfinished} answers did not end within max_new_tokens and are kept")
        for reason, rows in self.dropped.items():
            numbers = ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
            lines.append(f"{len(rows)} dropped, {REASONS[reason]}: row{'s'[: len(rows) > 1]} {numbers}")
        return lines


def regenerate(settings: RegenerateSettings) -> AnswerCounts:
    """Write `settings.out`: the rows of `settings.data` with the base model's own answers (docs/regenerate.md).

    A run that was killed is resumed.

    Raises:
        UserError: for a setting, a file or a base model that cannot be used, before the base model is loaded wherever
            it can be known by then; also if no row is left.
    """
    settings.check_output()
    file = PromptFile.read(settings.data)
    run = _Run(settings)
    rows = evenly_spaced(file.table.num_rows, settings.num_rows)
    shards = [rows[i : i + settings.shard_rows] for i in range(0, len(rows), settings.shard_rows)]
    log = AnswerLog(settings.out)
    resume = log.load(run.identity(), overwrite=settings.overwrite)
    with progress_bar() as progress:
        checking = progress.add_task("checking rows", total=len(rows))
        num_answers = {}
        for conversation in chain.from_iterable(map(file.conversations, shards)):
            if not resume and not conversation.uses_tools:  # the rows of a run that is resumed have been checked
                run.prompt_ids(conversation, conversation.unanswered[-1])
            num_answers[conversation.row] = len(conversation.unanswered)
            progress.advance(checking)
        if missing := shards[len(log.shards) :]:
            backend = run.load_backend()
            # Anew: a base model from the hub has a fingerprint only once it is downloaded.
            log.begin(run.identity())
            total, left = sum(num_answers.values()), sum(num_answers[row] for shard in missing for row in shard)
            task = progress.add_task(f"{settings.data.name} (answers)", total=total, completed=total - left)
            for shard in missing:
                log.append(run.answer(list(file.conversations(shard)), backend, partial(progress.advance, task)))
    counts = AnswerCounts(list(chain.from_iterable(log.shards)))
    if not counts.written:
        log.remove()
        advice = f"; expected a larger --max-new-tokens than {settings.max_new_tokens}, or --keep-unfinished"
        reasons = "; ".join(counts.summary()[1:]) + (advice if UNFINISHED in counts.dropped else "")
        raise UserError(f"data={settings.data}: no row is left: {reasons}")
    write_answers(settings.out, file, log.shards, run.provenance(counts))
    log.remove()
    return counts


def write_answers(out: Path, file: PromptFile, shards: list[list[Record]], description: Mapping[str, Any]) -> None:
    """Write the rows that are not dropped, with their answers."""
    import pyarrow.parquet as pq

    schema = file.schema.with_metadata({**(file.schema.metadata or {}), METADATA_KEY: json.dumps(description)})
    with atomic_file(out) as path, pq.ParquetWriter(path, schema) as writer:
        for shard in shards:
            if answers := {record["row"]: record["answers"] for record in shard if "dropped" not in record}:
                writer.write_table(file.answered(answers))


class _Run:
    """Settings with what `auto` means and what the base model's files say."""

    def __init__(self, settings: RegenerateSettings) -> None:
        base = BaseModelLoader(settings.base, device=settings.device, dtype=settings.dtype)
        self.settings, self.device, self.dtype = settings, base.device, base.dtype
        self.tokenizer, self.end_tokens = base.tokenizer, base.end_token_ids
        if not self.end_tokens and not settings.keep_unfinished:
            raise UserError(
                f"base={settings.base}: names no end token, so that no answer ends; expected --keep-unfinished, or an "
                "eos_token_id in its generation_config.json"
            )

    def load_backend(self) -> Backend:
        from verl_speculator.data.generation_backends import HuggingFaceBackend, VllmBackend

        if self.settings.backend == "vllm":
            return VllmBackend(self.settings, self.dtype, self.end_tokens)
        pad_token = self.tokenizer.pad_token_id
        return HuggingFaceBackend(self.settings, self.device, self.dtype, self.end_tokens, pad_token)

    def prompt_ids(self, conversation: Conversation, index: int) -> list[int]:
        try:
            return tokenize_prompt(self.tokenizer, conversation.messages[:index])
        except UserError as error:
            raise UserError(f"data={self.settings.data}, row {conversation.row}: {error}") from None

    def answer(
        self, conversations: list[Conversation], backend: Backend, advance: Callable[[int], None]
    ) -> list[Record]:
        """Answer conversations turn by turn: each round answers the next message of all that are not finished."""
        records: dict[int, Record] = {
            each.row: {"row": each.row, "answers": [], "tokens": 0, "unfinished": 0} for each in conversations
        }

        def drop(conversation: Conversation, reason: str) -> None:
            records[conversation.row] = {"row": conversation.row, "dropped": reason}
            advance(len(conversation.unanswered))

        pending = conversations
        while pending:
            prompts: list[tuple[Conversation, list[int]]] = []
            for conversation in pending:
                if conversation.uses_tools:
                    drop(conversation, TOOLS)
                    continue
                ids = self.prompt_ids(conversation, conversation.unanswered[0])
                if backend.limit is not None and len(ids) >= backend.limit:
                    drop(conversation, TOO_LONG)
                else:
                    prompts.append((conversation, ids))
            seeds = [_seed(self.settings.seed, each.row, each.unanswered[0]) for each, _ in prompts]
            for i, tokens, finished in backend.generate([ids for _, ids in prompts], seeds):
                conversation = prompts[i][0]
                if not finished and not self.settings.keep_unfinished:
                    drop(conversation, UNFINISHED)
                    continue
                # Cleaning up would change the spaces that the base model generated.
                text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                conversation.answer(text)
                record = records[conversation.row]
                record["answers"].append(text)
                record["tokens"] += len(tokens)
                record["unfinished"] += not finished
                advance(1)
            pending = [each for each, _ in prompts if each.unanswered and "dropped" not in records[each.row]]
        return list(records.values())

    def identity(self) -> dict[str, Any]:
        """What must be the same for shards to belong together."""
        settings = self.settings
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        identity = asdict(settings) | {
            "base": weights_fingerprint(settings.base) or settings.base,
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:32],
            "data": file_digest(settings.data),
            "device": self.device.split(":")[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "end_tokens": list(self.end_tokens),
        }
        del identity["out"], identity["overwrite"]
        del identity["batch_size"]  # it decides nothing but rounding, and a smaller one may let a run finish
        return identity

    def provenance(self, counts: AnswerCounts) -> dict[str, Any]:
        """The metadata of the result."""
        settings, identity = self.settings, self.identity()
        vllm = {"vllm": metadata.version("vllm")} if settings.backend == "vllm" else {}
        del identity["base"]
        return {
            "command": "regenerate",
            "base": settings.base,
            "base_fingerprint": weights_fingerprint(settings.base),
            "data": str(settings.data),
            "data_sha256": identity.pop("data"),
            "temperature": settings.temperature,
            "seed": settings.seed,
            "settings": identity | {"batch_size": settings.batch_size},
            "counts": {
                "rows": counts.rows,
                "rows_written": counts.written,
                "answers": counts.answers,
                "answer_tokens": counts.tokens,
                "unfinished": counts.unfinished,
                "dropped": {reason: len(rows) for reason, rows in counts.dropped.items()},
            },
            "dropped_rows": counts.dropped,
            "versions": versions() | vllm,
            "commit": git_commit(),
            "hardware": hardware(self.device),
            "date": datetime.date.today().isoformat(),
        }


def _seed(seed: int, row: int, index: int) -> int:
    """For one answer, so that what is drawn does not depend on where a run was interrupted."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {index}".encode()).digest()[:4])


class AnswerLog:
    """The answers so far, in `<out>.answers.jsonl`: what they depend on, then a line of records for each shard.

    A kill costs the shard that is being answered: a line counts once its line break is written.

    Attributes:
        shards: records of the finished shards, in order.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.answers.jsonl")
        self.shards: list[list[Record]] = []

    def load(self, identity: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Read a log that an earlier run left; False if there is none. Nothing is written.

        Raises:
            UserError: if it is of other settings and there is no `overwrite`, or no such log.
        """
        if not self.path.exists():
            return False
        try:
            recorded, *shards = map(json.loads, self.path.read_text().split("\n")[:-1])
            pairs = {name: (recorded.get(name), identity.get(name)) for name in sorted({*recorded, *identity})}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.path}: expected answers for {self.out.name} ({error}); remove it") from None
        differing = [f"{name} ({before}, {now})" for name, (before, now) in pairs.items() if before != now]
        if differing and not overwrite:
            raise UserError(
                f"{self.path}: begun with other settings (its own, this command's): {', '.join(differing)}; expected "
                "the same to resume, or --overwrite to begin anew"
            )
        self.shards = [] if differing else shards
        return not differing

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write the log with the shards that were loaded, without the torn line of a killed run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in (identity, *self.shards)))

    def append(self, records: list[Record]) -> None:
        """Save a finished shard."""
        self.shards.append(records)
        with self.path.open("a") as file:
            file.write(json.dumps(records) + "\n")
        fsync(self.path)

    def remove(self) -> None:
        """Remove the log, and what killed runs left half written."""
        self.path.unlink()
        for name in (self.out.name, self.path.name):
            for path in self.out.parent.glob(f"{TEMPORARY}*.{name}"):
                path.unlink(missing_ok=True)
