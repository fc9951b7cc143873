"""The overrides by which verl's rollout decodes with a speculator, and the settings that are refused. Imports no torch.

Read from verl 0.9.1, whose rollout starts a vLLM server from `actor_rollout_ref.rollout` (docs/serving-engines.md).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo, read_checkpoint_info
from verl_speculator.config.schema import SpeculatorConfig, SpeculatorSettings
from verl_speculator.interop import eagle3
from verl_speculator.interop.engine_formats import (
    KEY,
    PROPOSER,
    arctic_unsupported_reason,
    draft_model_unsupported_reason,
    medusa_unsupported_reason,
    proposer_unsupported_reason,
)
from verl_speculator.training import MODEL_TYPE
from verl_speculator.utils.settings import UserError, nearest
from verl_speculator.vllm_plugin.compat import (
    DRAFT_UP_TO,
    NEWEST,
    OLDEST,
    VERSIONS,
    ProposerSettings,
    check_served,
    check_version,
    installed_vllm,
    minor_version,
)


class Engine(NamedTuple):
    """A program that drafts in the rollout.

    Attributes:
        unsupported_reason: why it cannot serve a configuration, None if it can.
        method: of vLLM's speculative_config.
        oldest: (major, minor) of vLLM.
        newest: (major, minor) of vLLM.
        versions: of vLLM, for messages.
        package: what to install.
        format: of the export that it loads, None where it loads the checkpoint.
    """

    unsupported_reason: Callable[[SpeculatorConfig], str | None]
    method: str
    oldest: tuple[int, int] = OLDEST
    newest: tuple[int, int] = NEWEST
    versions: str = VERSIONS
    package: str = "verl_speculator[vllm]"
    format: str | None = None


OURS, V1, V2, EAGLE3 = "vllm", "vllm-v1", "vllm-v2", "vllm-eagle3"
ENGINES = {
    V1: Engine(proposer_unsupported_reason, "custom_class"),
    V2: Engine(draft_model_unsupported_reason, "mtp", (0, 28), versions="0.28 to 0.33", format="vllm"),
    "arctic": Engine(
        arctic_unsupported_reason, "arctic", (0, 26), (0, 26), "0.26.0", package="arctic-inference==0.3.0"
    ),
    "vllm-medusa": Engine(medusa_unsupported_reason, "medusa", newest=(0, 32), versions="0.24 to 0.32"),
    EAGLE3: Engine(
        eagle3.unsupported_reason,
        "eagle3",
        newest=(0, 32),
        versions="0.24 to 0.32",
        package="vllm",
        format="vllm-eagle3",
    ),
}
PURPOSES = ("ppo", "generation")
MODEL = "actor_rollout_ref.model."
ROLLOUT = "actor_rollout_ref.rollout."
SERVER = ROLLOUT + "engine_kwargs.vllm."
SPECULATION = SERVER + "speculative_config."
EXTENSION = SERVER + "worker_extension_cls"
BASE = MODEL + "path"
GATE, PARALLEL = "num_speculative_tokens_per_batch_size", ROLLOUT + "data_parallel_size"
STRATEGY = "actor_rollout_ref.actor.strategy"
ARCTIC_SWITCH, RUNNER_SWITCH = "ARCTIC_INFERENCE_ENABLED", "VLLM_USE_V2_MODEL_RUNNER"
POLICY = "verl_speculator.training.model_config.SpeculatorPolicyConfig"
WORKER_EXTENSION = "verl_speculator.vllm_plugin.worker.VerlSpeculatorWorkerExtension"


class Setting(NamedTuple):
    """A value that is printed unless the user gives one.

    Attributes:
        accepted: the value that is printed, as Hydra reads it, and others that are accepted.
        reason: what another value would do; empty where any value is accepted.
        new: whether verl's configuration has no such key.
    """

    accepted: tuple[Any, ...]
    reason: str
    new: bool = False

    def check(self, key: str, value: Any) -> None:
        """Reject another value of this setting."""
        if self.reason and value not in self.accepted:
            raise UserError(f"{key}={value}: {self.reason}; expected {' or '.join(map(quote, self.accepted))}")


# For a speculator that is trained with the policy.
SYNC_REQUIREMENTS = {
    MODEL + "model_type": Setting((MODEL_TYPE,), "the actor would have no speculator", new=True),
    MODEL + "speculator.train": Setting(
        (True,), "the speculator would not be trained, and verl.trainer.main_ppo does that", new=True
    ),
    STRATEGY: Setting(("fsdp2",), "a policy with a speculator is sharded by FSDP2 alone"),
    ROLLOUT + "name": Setting(("vllm",), "no other engine takes a newer speculator"),
    SPECULATION + "method": Setting(("custom_class",), "no other drafter takes a newer speculator", new=True),
    EXTENSION: Setting((WORKER_EXTENSION,), "the rollout could not receive a newer speculator", new=True),
    ROLLOUT + "checkpoint_engine.backend": Setting(("naive",), "the actors would not share a machine with the rollout"),
    ROLLOUT + "disaggregation.enabled": Setting((False, None), "an actor would not know which server to send to"),
    "trainer.use_v1": Setting((True,), "verl's older trainer is not supported"),
    "trainer.v1.trainer_mode": Setting(("sync", "colocate_async"), "its actors share no machine with the rollout"),
}
# Of those, the settings that verl's defaults do not meet. The reference has the actor's values unless it is set apart.
PRINTED_FOR_SYNC = (STRATEGY, MODEL + "model_type", MODEL + "speculator.train")
# For the rollout of a policy, whose text has to be the policy's. All of this is vLLM's default.
LOSSLESS = {
    SPECULATION + "rejection_sample_method": Setting(
        ("standard", "block"), "the rollout would not be the policy's: other ways of verification change the text"
    )
}
# Read from ArcticInference 0.3.0 (vllm/config.py, pyproject.toml) and verl 0.9.1.
ARCTIC_NOTES = (
    "ArcticInference 0.3.0 needs vLLM 0.26.0 exactly, where verl 0.9.1's own extra pins 0.24.0",
    f"ArcticInference drafts for at most 64 requests at a time: +{SPECULATION}disable_by_batch_size=N raises that",
)
# vLLM chooses the method of a draft model by these words in its path, whatever the setting `method` is, unless that is
# eagle3.
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")


class Arguments(NamedTuple):
    """The output of `verl-speculator rollout-args`.

    Attributes:
        overrides: Hydra overrides, one a line.
        notes: what else has to be done.
    """

    overrides: list[str]
    notes: list[str]


def parse_override(override: str) -> Override:
    """An override, parsed by Hydra. Raises UserError for a text that is none."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        raise UserError(f"{override!r} is not an override: expected key=value") from None


def quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    try:
        if parse_override(f"key={value}").value() == value:
            return value
    except UserError:
        pass
    return QuotedString(value, Quote.single).with_quotes()


def _check_path(info: CheckpointInfo, engine: str) -> None:
    """Refuse a path in which vLLM would find another method, and a file that the engine does not load."""
    path = str(info.directory.resolve())
    words = () if engine == EAGLE3 else METHOD_WORDS
    word = next((word for word in words if word in path.lower()), None)
    if word is not None:
        raise UserError(
            f"{path}: vLLM takes a draft model with {word!r} anywhere in its path for another method; expected a path "
            f"without {', '.join(METHOD_WORDS)}"
        )
    if (name := ENGINES[engine].format) is not None and not info.is_draft_model:
        raise UserError(
            f"{info.directory}: --engine {engine} loads an export; expected the directory of "
            f"`verl-speculator export {info.directory} --format {name} --out DIR`"
        )
    if engine == "arctic" and not (info.directory / WEIGHTS_FILE).is_file():
        raise UserError(f"{info.directory}: no {WEIGHTS_FILE}; expected verl-speculator export --format arctic")


def _check_base(info: CheckpointInfo, base: str) -> None:
    """Refuse a base model of another shape or other weights than the speculator's."""
    info.check_base(*base_shape(base))
    info.check_base_weights(base)


def _runner(version: str | None) -> tuple[str, str]:
    """The one of our drafters that a vLLM runs, and why: from 0.29 on its V2 runner is the default."""
    if (forced := os.environ.get(RUNNER_SWITCH)) in ("0", "1"):
        return (V2 if forced == "1" else V1), f"{RUNNER_SWITCH}={forced}"
    if version is None:
        return V1, "vLLM is not installed here, and verl 0.9.1's own, 0.24, has the V1 runner"
    engine = V2 if minor_version(version) >= (0, 29) else V1
    return engine, f"vLLM {version} runs its {engine[-2:].upper()} runner unless {RUNNER_SWITCH} is set"


def _check_installed(name: str) -> list[str]:
    """Refuse installed versions that cannot serve; a note if none is installed."""
    engine, version = ENGINES[name], installed_vllm()
    forced, runner = os.environ.get(RUNNER_SWITCH), "0" if name != V2 else "1"
    if name != EAGLE3 and forced in ("0", "1") and forced != runner:
        raise UserError(
            f"{RUNNER_SWITCH}={forced}: --engine {name} drafts in vLLM's {'V2' if name == V2 else 'V1'} runner alone; "
            f"expected {runner}"
        )
    install = f"pip install {engine.package}"
    if version is None:
        return [f"vLLM is not installed here; where the rollout runs it needs {engine.versions}: {install}"]
    if name in (V1, V2):
        check_version(version)
        if minor_version(version) < engine.oldest:
            raise UserError(f"vllm {version}: --engine {name} needs {engine.versions}; expected that, or --engine {V1}")
        if _runner(version)[0] != name:
            return [f"export {RUNNER_SWITCH}={runner} where the rollout runs: vLLM {version} has another default"]
    if name == "arctic":
        try:
            metadata.version("arctic-inference")
        except metadata.PackageNotFoundError:
            raise UserError(f"--engine arctic: arctic-inference is not installed; expected {install}") from None
    if not engine.oldest <= minor_version(version) <= engine.newest:
        raise UserError(f"vllm {version}: --engine {name} needs {engine.versions}; expected that, or --engine vllm")
    return []


def _required_settings(info: CheckpointInfo, engine: str, purpose: str, train: bool) -> dict[str, Setting]:
    """Every setting that decides whether the trained weights draft."""
    path, is_proposer, version = str(info.directory.resolve()), engine == V1, installed_vllm()
    in_v2 = engine == V2 or (engine == EAGLE3 and _runner(version)[0] == V2)
    # Those that load a drafter apart from the target model; the V2 runner does from 0.31 on.
    loads_apart = engine in (V2, EAGLE3) and (not in_v2 or minor_version(version or "0.33") >= (0, 31))
    other_drafter, n_predict = "another drafter would run", info.config.n_predict
    settings = {
        ROLLOUT + "name": Setting(("vllm",), "the speculator would not be served"),
        SPECULATION + "method": Setting((ENGINES[engine].method,), other_drafter, new=True),
        SPECULATION + "model": Setting((PROPOSER if is_proposer else path,), other_drafter, new=True),
        SPECULATION + "num_speculative_tokens": Setting(
            (n_predict,), "it was trained to draft as many as its n_predict", new=True
        ),
    }
    if is_proposer:
        settings[f"{SERVER}additional_config.{KEY}.path"] = Setting((path,), "another checkpoint would draft", new=True)
        if purpose == "ppo":
            settings[EXTENSION] = SYNC_REQUIREMENTS[EXTENSION]
    if purpose == "generation":
        settings[ROLLOUT + "load_format"] = Setting(("auto",), "the base that answers would have random weights")
    elif loads_apart:
        settings[SPECULATION + "draft_load_config.load_format"] = Setting(
            ("auto",), "the speculator would have random weights", new=True
        )
    elif not is_proposer:
        # The target model gets the trainer's weights before the first rollout; a drafter of vLLM's own never does.
        settings[ROLLOUT + "load_format"] = Setting(("auto",), "the speculator would have random weights")
    if in_v2:
        gate = [[1, DRAFT_UP_TO, n_predict], [DRAFT_UP_TO + 1, 2**20, 0]]
        settings[SPECULATION + GATE] = Setting((gate,), "", new=True)
    if purpose == "ppo" and engine in (V2, EAGLE3, "vllm-medusa"):  # ArcticInference saves its drafter before level 2
        settings[ROLLOUT + "free_cache_engine"] = Setting(
            (False,), "a sleeping engine gives the speculator's weights back and wakes up with none"
        )
    if train:
        settings |= {key: SYNC_REQUIREMENTS[key] for key in PRINTED_FOR_SYNC}
        settings[MODEL + "_target_"] = Setting((POLICY,), "verl's own configuration refuses a speculator")
        settings[MODEL + "speculator.path"] = Setting((path,), "the actor would train another speculator", new=True)
    if engine == "arctic" and purpose == "ppo":
        settings[f"ray_kwargs.ray_init.runtime_env.env_vars.{ARCTIC_SWITCH}"] = Setting(
            ("1",), "ArcticInference would stay switched off", new=True
        )
    return settings


def _check_overrides(overrides: Sequence[str], required: Mapping[str, Setting], info: CheckpointInfo) -> dict[str, Any]:
    """Refuse overrides of the user that contradict the required settings, and another base model.

    Returns:
        The values that they set, by key.
    """
    parsed = [parse_override(override) for override in overrides]
    values = {override.key_or_group: None if override.is_delete() else override.value() for override in parsed}
    for key, value in values.items():
        if key in required:
            required[key].check(key, value)
        if key == BASE and isinstance(value, str):
            _check_base(info, value)
    return values


def rollout_arguments(
    info: CheckpointInfo,
    *,
    engine: str = "vllm",
    purpose: str = "ppo",
    train: bool = False,
    overrides: Sequence[str] = (),
) -> Arguments:
    """The overrides for verl's PPO trainer or its generation server, followed by the user's.

    Args:
        info: the checkpoint.
        engine: vllm (our drafter for the installed vLLM, vllm-v1 or vllm-v2; for eagle3 vLLM's own, vllm-eagle3),
            arctic, vllm-medusa or vllm-eagle3.
        purpose: ppo (`verl.trainer.main_ppo`) or generation (`verl.trainer.main_generation_server`).
        train: the actor trains the speculator and sends it to the rollout (`verl_speculator.train_ppo`).
        overrides: the user's, which are checked against the required ones.

    Raises:
        UserError: for an engine that cannot serve the speculator (with what to train instead), a path that vLLM would
            misread, versions that cannot serve it, and overrides with which other weights than the trained would draft.
    """
    for option, value, known in (("engine", engine, (OURS, *ENGINES)), ("for", purpose, PURPOSES)):
        if value not in known:
            raise UserError(f"--{option} {value}: expected one of {', '.join(known)}{nearest(value, known)}")
    notes = []
    if engine == OURS:
        engine, reason = _runner(installed_vllm())
        if eagle3.unsupported_reason(info.config) is None:
            engine, reason = EAGLE3, f"vLLM itself serves {info.config.method}"
        notes = [f"--engine {engine}, since {reason}"]
    if train and engine == EAGLE3:
        raise UserError(
            f"--train with --engine {EAGLE3}: vLLM's own drafter receives no newer speculator from verl 0.9.1; "
            "expected no --train, or a speculator that our own drafter serves"
        )
    if train and (engine, purpose) != (V1, "ppo"):
        raise UserError(
            f"--train with --engine {engine} --for {purpose}: only our own drafter in the V1 runner receives newer "
            f"speculators from verl 0.9.1, which fits vLLM up to 0.28; expected --engine {V1} --for ppo"
        )
    if (reason := ENGINES[engine].unsupported_reason(info.config)) is not None:
        raise UserError(f"--engine {engine}: cannot serve {info.directory}: {reason}")
    if engine != V1:
        _check_path(info, engine)
    required = _required_settings(info, engine, purpose, train)
    checked = (SYNC_REQUIREMENTS if train else {}) | (LOSSLESS if purpose == "ppo" else {}) | required
    given = _check_overrides(overrides, checked, info)
    notes += _check_installed(engine)
    if engine == V1:
        notes.append(
            "vLLM 0.24 leaves the speculator out of its memory account: where memory is scarce, lower "
            f"{ROLLOUT}gpu_memory_utilization by its size"
        )
    if SPECULATION + GATE in required and given.get(PARALLEL, 1) != 1:
        notes.append(
            f"{PARALLEL}={given[PARALLEL]}: vLLM then ignores {SPECULATION}{GATE}, so drafts are verified in a batch "
            "of any size"
        )
    if engine == "arctic":
        notes += ARCTIC_NOTES
        if purpose == "generation":
            notes.append(f"export {ARCTIC_SWITCH}=1: verl's generation server passes no other variables to its workers")
    if train:
        notes.append("start python -m verl_speculator.train_ppo in place of python -m verl.trainer.main_ppo")
    if BASE not in given:
        notes.append(f"no {BASE}=… among your overrides: the speculator was not held against its base")
    printed = [
        f"{'+' * setting.new}{key}={quote(setting.accepted[0])}"
        for key, setting in required.items()
        if key not in given
    ]
    return Arguments([*printed, *overrides], notes)


def check_ppo(config: DictConfig) -> list[str]:
    """Check a run of `train_ppo` before anything starts.

    Args:
        config: verl's, with overrides.

    Returns:
        Notes.

    Raises:
        UserError: for a setting with which no newer speculator would reach the rollout; a checkpoint that the proposer
            cannot serve, of another base model or with another number of drafts; or a package that is not installed.
    """

    def select(name: str) -> dict[str, Any]:
        node = OmegaConf.select(config, name)
        return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}

    if OmegaConf.select(config, MODEL + "model_type") is None:
        raise UserError(
            f"{MODEL}model_type: the actor would have no speculator; expected what "
            "verl-speculator rollout-args CHECKPOINT --train prints"
        )
    for name, setting in SYNC_REQUIREMENTS.items():
        setting.check(name, OmegaConf.select(config, name))
    for name, setting in LOSSLESS.items():
        setting.check(name, OmegaConf.select(config, name, default=setting.accepted[0]))
    training = SpeculatorSettings.parse(select(MODEL + "speculator")).training
    info = read_checkpoint_info(ProposerSettings.parse(select(SERVER + "additional_config")).path)
    first_path = None if training.path is None else read_checkpoint_info(training.path).directory.resolve()
    if first_path not in (None, info.directory.resolve()):
        raise UserError(
            f"{MODEL}speculator.path={training.path}: the rollout begins with another; expected {info.directory}"
        )
    check_served(info, OmegaConf.select(config, SPECULATION + "num_speculative_tokens"))
    _check_base(info, OmegaConf.select(config, BASE))
    if importlib.util.find_spec("transfer_queue") is None:
        raise UserError("TransferQueue is not installed, and verl's PPO needs it: pip install verl_speculator[ppo]")
    return _check_installed(V1)
