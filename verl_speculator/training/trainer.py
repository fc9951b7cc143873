"""verl's SFT trainer with a speculator. The loop is our own, because validation, metrics and resuming differ."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Iterable
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.memory_utils import aggressive_empty_cache
from verl.utils.tracking import FileLogger, Tracking
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from verl_speculator.checkpoint.format import DRAFT_TOKENS, find_resume_path, read_checkpoint_info, read_weights
from verl_speculator.checkpoint.provenance import git_commit, versions, weights_fingerprint
from verl_speculator.config.draft_vocabulary import VOCABULARY_FILE, DraftVocabulary, most_used, vocabulary_digest
from verl_speculator.data.dataset import (
    NumberedDataset,
    PaddedDataset,
    ResumableSampler,
    build_dataset,
    count_answer_tokens,
    count_states,
    is_text,
)
from verl_speculator.data.hidden_state_cache import SETTING, StateCache, check_directory, identify_states, say_size
from verl_speculator.data.run_record import RECORD, record_settings
from verl_speculator.losses import DraftSums
from verl_speculator.training import MODEL_TYPE
from verl_speculator.training.base_model import from_rank_0
from verl_speculator.training.checkpointing import RunCheckpoints
from verl_speculator.training.engine import BASE_SUMS, DRAFT_SUMS
from verl_speculator.training.run_output import RunOutput, console_line, print_summary, summarise_run
from verl_speculator.utils.atomic_io import check_metrics_file
from verl_speculator.utils.process import INTERRUPTED, StopRequest, evenly_spaced
from verl_speculator.utils.settings import UserError, one_line

logger = logging.getLogger(__name__)

COUNTED_ROWS = 10_000  # rows of the training data in which the tokens of a draft vocabulary are counted
FILE, CONSOLE = "file", "console"  # verl's names of the loggers that write metrics to a file and to the terminal


class SpeculatorTrainer(SFTTrainer):
    """Trains a speculator, alone or with its base, as verl trains a model.

    verl's constructor calls the `_build_*` methods in order, with the engine after the data; `fit` then runs to
    `trainer.total_training_steps`, or over `trainer.total_epochs`, whichever is set.
    """

    # Building

    def _build_config(self) -> None:
        super()._build_config()
        self.tracking = self._start_tracking() if dist.get_rank() == 0 else None

    def _start_tracking(self) -> Tracking:
        """The loggers, before anything heavy loads: a service may still reject settings that passed the local checks.
        verl's file logger truncates its file, so it is only checked here and started by `fit`."""
        settings = self.config.trainer
        names = [settings.logger] if isinstance(settings.logger, str) else list(settings.logger)
        self._prints = CONSOLE in names  # verl prints all digits of all metrics
        names = [name for name in names if name != CONSOLE]
        self._logs_to_file = FILE in names
        if self._logs_to_file:
            check_metrics_file(f"trainer.logger={FILE}", settings.project_name, settings.experiment_name)
            names.remove(FILE)
        values = OmegaConf.to_container(self.config, resolve=True)
        try:
            return Tracking(settings.project_name, settings.experiment_name, default_backend=names, config=values)
        except Exception as error:  # each backend has errors of its own
            raise UserError(f"trainer.logger={settings.logger}: {one_line(error, 200)}") from error

    def _build_dataset(self) -> None:
        data, model = self.config.data, self.model_config
        build = partial(build_dataset, config=data, tokenizer=model.tokenizer, processor=model.processor)
        self.train_dataset = build(data.train_files, max_samples=data.train_max_samples)
        self.val_dataset = build(data.val_files, max_samples=data.val_max_samples) if data.val_files else None
        end_tokens = model.end_token_ids
        if is_text(data.train_files, data):
            model.end_token_ids = ()  # every token is a target
        if model.speculator_config.draft_vocab_size is not None and model.draft_tokens is None:
            model.draft_tokens = self._choose_draft_tokens(end_tokens)
        if dist.get_rank() == 0:  # the writer; now, since the files may have changed by the first checkpoint
            self._record = record_settings(self.config, model.speculator_training, model.tokenizer)
        self.state_cache = None
        if data.cache_hidden_states:
            self.state_cache = self._open_state_cache()
            self.train_dataset = NumberedDataset(self.train_dataset)

    def _choose_draft_tokens(self, end_tokens: Collection[int]) -> torch.Tensor:
        """The draft vocabulary: of the checkpoint that is resumed, else the most used tokens of the training answers,
        counted on a sample of the rows and written to the run's folder."""
        model, directory = self.model_config, Path(self.config.trainer.default_local_dir)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        folder = from_rank_0(find_resume_path(directory, self.config.trainer) if rank == 0 else None)
        if folder is not None:
            info = read_checkpoint_info(folder) if rank == 0 else None
            tokens = from_rank_0(read_weights(info).get(DRAFT_TOKENS) if rank == 0 else None)
            if tokens is not None:  # else the checkpoint has no draft vocabulary, which its loading refuses
                return tokens
        size, vocab_size = model.speculator_config.draft_vocab_size, model.hf_config.get_text_config().vocab_size
        rows = evenly_spaced(len(self.train_dataset), COUNTED_ROWS)[rank::ranks]
        counts = count_answer_tokens(self.train_dataset, rows, self.config.data.num_workers, vocab_size, show=rank == 0)
        dist.all_reduce(counts)
        counts = counts.tolist()
        tokens = most_used(counts, size, end_tokens)
        coverage = sum(counts[token] for token in tokens) / max(sum(counts), 1)
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            digest = vocabulary_digest(model.tokenizer)
            DraftVocabulary(tokens, vocab_size, digest, coverage).write(directory / VOCABULARY_FILE)
            logger.info("draft vocabulary: %d tokens, %.2f %% of those in the answers", size, 100 * coverage)
        return torch.tensor(tokens)

    def _open_state_cache(self) -> StateCache:
        """The cache that the settings name; rank 0 creates it if it does not exist."""
        data, model = self.config.data, self.model_config
        directory = Path(data.cache_hidden_states)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        identity = identify_states(self.config, model.tokenizer) if rank == 0 else None
        if not from_rank_0(rank == 0 and check_directory(directory, identity)):
            rank_rows = range(rank, len(self.train_dataset), ranks)
            lengths = torch.zeros(len(self.train_dataset), dtype=torch.long)
            whole = model.speculator_config.reads_sequence
            lengths[rank::ranks] = count_states(
                self.train_dataset, rank_rows, data.num_workers, show=rank == 0, whole=whole
            )
            dist.all_reduce(lengths)
            if rank == 0:
                width = model.hf_config.get_text_config().hidden_size * model.speculator_config.cached_states
                cache = StateCache.create(directory, identity, lengths.numpy(), width)
                logger.info("%s: %s for %d states", directory, say_size(cache.size), lengths.sum())
            dist.barrier()
        if not directory.is_dir():
            raise UserError(f"{SETTING}={directory}: expected a directory that all machines share")
        cache = StateCache(directory)
        logger.info("%s: states of %d of %d rows are cached", directory, cache.written, cache.rows)
        return cache

    def _worker_config(self) -> TrainingWorkerConfig:
        """The configuration of verl's worker, in this process or another."""
        return TrainingWorkerConfig(
            model_type=MODEL_TYPE,
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )

    def _build_engine(self) -> None:
        self.training_client = TrainingWorker(self._worker_config())
        self.training_client.set_loss_fn(partial(sft_loss, config=None))
        self.engine, self.processes = self.training_client.engine, dist.get_world_size()
        self.engine.state_cache = self.state_cache

    def _build_dataloader(self) -> None:
        data = self.config.data
        ranks = self.engine.get_data_parallel_size()
        self.global_batch_size = data.train_batch_size
        self.batch_size_per_rank = self.global_batch_size // ranks
        place = {"num_replicas": ranks, "rank": self.engine.get_data_parallel_rank(), "drop_last": True}
        load = partial(
            DataLoader,
            batch_size=self.batch_size_per_rank,
            collate_fn=SFTTensorCollator(data.pad_mode),
            num_workers=data.num_workers,
        )
        self.train_sampler = ResumableSampler(self.train_dataset, shuffle=True, seed=self.config.trainer.seed, **place)
        self.train_dataloader = load(self.train_dataset, sampler=self.train_sampler, drop_last=True)
        self.val_dataloader = None
        if self.val_dataset is not None:
            # Every rank needs the same number of whole micro-batches; the rows that fill them up have no target.
            padded = PaddedDataset(self.val_dataset, self.processes * data.micro_batch_size_per_gpu)
            self.val_dataloader = load(padded, sampler=DistributedSampler(padded, shuffle=False, **place))

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = RunCheckpoints(self.engine, self.config.trainer)

    @cached_property
    def _fingerprint(self) -> str | None:
        return weights_fingerprint(self.model_config.path, self.model_config.gguf_file)

    def _provenance(self, step: int) -> dict[str, Any]:
        model, data = self.model_config, self.config.data
        trained = not model.freeze_base_model
        return {
            "base": {
                "name": model.path,
                "quantization": model.quantization,
                "gguf_file": model.gguf_file,
                "trained_jointly": trained,
                # The fingerprint is not that of a jointly trained base model.
                "weights_fingerprint": None if trained else self._fingerprint,
            },
            "data": {
                "train_files": list(data.train_files),
                "train_rows": len(self.train_dataset),
                "val_files": list(data.val_files),
                "val_rows": 0 if self.val_dataset is None else len(self.val_dataset),
            },
            "training": {
                "step": step,
                "total_steps": self.total_training_steps,
                "train_batch_size": self.global_batch_size,
                "lr": self.optimizer_config.lr,
                "speculator_lr": model.speculator_training.lr,
                "speculator_loss_coeff": model.speculator_loss_coeff,
                **model.speculator_training.objective.provenance,
                "seed": self.config.trainer.seed,
                "cached_states": self.state_cache is not None,
                "processes": self.processes,
            },
            RECORD: self._record,
            "versions": versions(),
            "git_commit": git_commit(),
        }

    # Metrics

    def _metrics(self, outputs: Iterable[TensorDict], prefix: str) -> dict[str, float]:
        """Scalars from the sums of one or several batches. verl collects one copy per rank, and all are equal."""
        batches = [tu.get(output, "metrics") for output in outputs]
        sums = {
            name: sum(torch.tensor(metrics[name][0], dtype=torch.float64) for metrics in batches)
            for name in (DRAFT_SUMS, BASE_SUMS)
            if name in batches[0]
        }
        model = self.model_config
        has_vocabulary = model.speculator_config.draft_vocab_size is not None
        values = DraftSums(*sums[DRAFT_SUMS]).metrics(
            model.speculator_training.objective, draft_vocabulary=has_vocabulary
        )
        loss = self.model_config.speculator_loss_coeff * values["speculator_loss"]
        if BASE_SUMS in sums:
            total, tokens = sums[BASE_SUMS].tolist()
            values["base_loss"] = total / max(tokens, 1.0)
            loss += values["base_loss"]
        return {f"{prefix}/loss": loss} | {f"{prefix}/{name}": value for name, value in values.items()}

    # The loop

    @property
    def _batch_settings(self) -> dict[str, Any]:
        names = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "pad_mode")
        return {name: self.config.data[name] for name in names} | {
            "use_remove_padding": self.model_config.use_remove_padding,
            "temperature": 1.0,
            "global_batch_size": self.global_batch_size,
            "pad_token_id": self.model_config.tokenizer.pad_token_id,
        }

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimizer step on this rank's rows of a global batch; the metrics of the global batch."""
        start = time.perf_counter()
        data = tu.get_tensordict(tensor_dict=batch, non_tensor_dict=self._batch_settings)
        seqlens = self._get_batch_seqlens(data=data)
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData(seqlens))
        output = self.training_client.train_batch(data=data)
        self.training_client.step_profile()
        engine_metrics = tu.get(output, "metrics")
        return self._metrics([output], "train") | {
            "train/grad_norm": engine_metrics["grad_norm"],
            "train/lr": engine_metrics["lr"],
            "train/global_tokens": sum(seqlens),
            "perf/tokens_per_second": sum(seqlens) / (time.perf_counter() - start),
            "perf/max_memory_allocated_gb": engine_metrics["perf/max_memory_allocated_gb"],
        }

    def validate(self) -> dict[str, float]:
        """Metrics over the validation files, every row counted once."""
        rows = tqdm(self.val_dataloader, desc="Validation", leave=False, disable=self.tracking is None)
        batches = (tu.get_tensordict(batch, self._batch_settings) for batch in rows)
        return self._metrics(map(self.training_client.infer_batch, batches), "val")

    def fit(self) -> None:
        """Train from the resumed step to the last one, with the checkpoints and validations that are due."""
        step, last = self.resume_global_step, self.total_training_steps
        if step >= last:
            logger.info("nothing to train: step %d of %d is reached", step, last)
            return
        if self.tracking is not None and self._logs_to_file:
            settings = self.config.trainer
            self.tracking.logger[FILE] = FileLogger(settings.project_name, settings.experiment_name)
        directory = Path(self.config.trainer.default_local_dir)
        self.output = RunOutput(directory, step) if self.tracking is not None else None
        with StopRequest() as stop:
            saved = self._run_steps(step, last, stop)
        if self.output is not None:
            self.output.close()
            if stop.made:
                sys.stderr.write(f"interrupted after step {saved}: saved; the same command goes on\n")
            else:
                self._print_summary(directory / f"global_step_{saved}", saved)
        if stop.made:
            raise SystemExit(INTERRUPTED)

    def _run_steps(self, step: int, last: int, stop: StopRequest) -> int:
        """Train from a step to the last one, or until a signal; the step of the newest checkpoint."""
        total_epochs, saved_at = -(-last // self.steps_per_epoch), time.monotonic()
        while step < last:
            epoch, done = divmod(step, self.steps_per_epoch)
            self.train_sampler.set_position(epoch, skip=done * self.batch_size_per_rank)
            aggressive_empty_cache(force_sync=True)
            end = min(self.steps_per_epoch, last - epoch * self.steps_per_epoch)
            progress = tqdm(
                islice(self.train_dataloader, end - done),
                initial=done,
                total=end,
                desc=f"Epoch {epoch + 1}/{total_epochs}",
                disable=self.tracking is None,
            )
            for batch in progress:
                step += 1
                if step == self.start_profile_step:
                    self.training_client.start_profile()
                metrics = self.train_step(batch)
                if step == self.end_profile_step:
                    self.training_client.stop_profile()
                is_stopped, is_late = self._agree(stop.made, self._is_late(saved_at))
                # Before a validation, whose failure then costs no training.
                if is_stopped or is_late or _is_due(step, last, self.save_freq):
                    aggressive_empty_cache(force_sync=True)
                    provenance = self._provenance(step) if self.tracking is not None else {}  # rank 0 writes it
                    self.ckpt_handler.save_checkpoint(step, provenance)
                    saved_at = time.monotonic()
                if self.val_dataloader is not None and not is_stopped and _is_due(step, last, self.test_freq):
                    metrics |= self.validate()
                if self.output is not None:
                    self.tracking.log(data=metrics, step=step)
                    self.output.log(step, metrics)
                    if self._prints:
                        progress.write(console_line(step, last, metrics))
                if is_stopped:
                    return step
        return last

    def _is_late(self, saved_at: float) -> bool:
        """Whether the newest checkpoint is older than `trainer.save_minutes`, by this process's clock."""
        minutes = self.config.trainer.save_minutes
        return minutes is not None and time.monotonic() - saved_at >= 60 * minutes

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag, true on all ranks if it is on any."""
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values]

    def _print_summary(self, checkpoint: Path, step: int) -> None:
        data, rows = self.config.data, len(self.train_dataset)
        print_summary(
            summarise_run(
                self.output.records,
                checkpoint,
                rows_seen=step * self.global_batch_size,
                rows=rows,
                base=self.model_config.path,
                prompts=(list(data.val_files) or list(data.train_files))[0],
            )
        )

    def _init_engine(self) -> None:
        super()._init_engine()
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train_batch_size={self.global_batch_size}: the training files have only "
                f"{len(self.train_dataset)} rows"
            )


def _is_due(step: int, last: int, frequency: int | None) -> bool:
    """Whether it is the last step or a multiple of `frequency`."""
    return step == last or bool(frequency and frequency > 0 and step % frequency == 0)
