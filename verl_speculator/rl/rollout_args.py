"""The overrides by which verl's rollout decodes with a speculator, and the settings that are refused. Imports no torch.

Read from verl 0.9.1, whose rollout starts a vLLM server from `actor_rollout_ref.rollout` (docs/serving-engines.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo, read_checkpoint_info
from verl_speculator.config.schema import SpeculatorSettings
from verl_speculator.interop.engine_formats import (
    KEY,
    PROPOSER,
    arctic_obstacle,
    medusa_obstacle,
    proposer_obstacle,
)
from verl_speculator.training import MODEL_TYPE
from verl_speculator.utils.errors import UserError, nearest
from verl_speculator.vllm_plugin.compat import (
    ProposerSettings,
    check_served,
    check_version,
    installed_vllm,
    minor_version,
)

ENGINES = {"vllm": proposer_obstacle, "arctic": arctic_obstacle, "vllm-medusa": medusa_obstacle}
METHODS = {"vllm": "custom_class", "arctic": "arctic", "vllm-medusa": "medusa"}
PURPOSES = ("ppo", "generation")
MODEL = "actor_rollout_ref.model."
ROLLOUT = "actor_rollout_ref.rollout."
SERVER = ROLLOUT + "engine_kwargs.vllm."
SPECULATION = SERVER + "speculative_config."
BASE = MODEL + "path"
STRATEGY = "actor_rollout_ref.actor.strategy"
ARCTIC_SWITCH = "ARCTIC_INFERENCE_ENABLED"
POLICY = "verl_speculator.training.model_config.SpeculatorPolicyConfig"
WORKER_EXTENSION = "verl_speculator.vllm_plugin.verl_worker.VerlSpeculatorWorkerExtension"
# For a speculator that is trained with the policy: the values that a setting may have, and what another would do.
SYNC_REQUIREMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    MODEL + "model_type": ((MODEL_TYPE,), "the actor would have no speculator"),
    MODEL + "speculator.train": ((True,), "nothing would follow, and verl.trainer.main_ppo does that"),
    STRATEGY: (("fsdp2",), "a policy with a speculator is sharded by FSDP2 alone"),
    ROLLOUT + "name": (("vllm",), "no other engine takes a newer speculator"),
    SPECULATION + "method": (("custom_class",), "no other drafter takes a newer speculator"),
    SERVER + "worker_extension_cls": ((WORKER_EXTENSION,), "the rollout could not take over a newer speculator"),
    ROLLOUT + "checkpoint_engine.backend": (("naive",), "the actors would not share a machine with the rollout"),
    ROLLOUT + "disaggregation.enabled": ((False, None), "an actor would not know which server to send to"),
    "trainer.use_v1": ((True,), "verl's older trainer is not supported"),
    # The trainers whose actors share a machine with the rollout.
    "trainer.v1.trainer_mode": (("sync", "colocate_async"), "its rollouts have no actor beside them"),
}
# Read from ArcticInference 0.3.0 (vllm/config.py, pyproject.toml) and verl 0.9.1.
ARCTIC_NOTES = (
    "ArcticInference 0.3.0 needs vLLM 0.26.0 exactly, where verl 0.9.1's own extra pins 0.24.0",
    f"ArcticInference drafts for at most 64 requests at a time: +{SPECULATION}disable_by_batch_size=N raises that",
)
# vLLM chooses the method of a draft model by these words in its path, whatever the setting `method` is.
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
_OVERRIDE = re.compile(r"^(?P<sign>\+{0,2}|~)(?P<key>[^=~+]+)=(?P<value>.*)$", re.DOTALL)
_PLAIN = re.compile(r"[\w./\-+@%*]+", re.ASCII)


class Setting(NamedTuple):
    """A required value.

    Attributes:
        value: as Hydra reads it.
        reason: what another value would do.
        new: whether verl's configuration has no such key.
    """

    value: Any
    reason: str
    new: bool = False

    @classmethod
    def for_sync(cls, key: str, *, new: bool = False) -> Setting:
        """The first value that `SYNC_REQUIREMENTS` accepts."""
        accepted, reason = SYNC_REQUIREMENTS[key]
        return cls(accepted[0], reason, new)


class Arguments(NamedTuple):
    """The output of `verl-speculator rollout-args`.

    Attributes:
        overrides: Hydra overrides, one a line.
        notes: what else has to be done.
    """

    overrides: list[str]
    notes: list[str]


def quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and not re.fullmatch(r"[\d.+\-]+|true|false|null", value, re.IGNORECASE):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def _parse_value(text: str) -> Any:
    """The value that Hydra reads from an override, as far as a comparison with a required value needs it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1].replace("\\'", "'")
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"\d+", text) else text


def _check_path(info: CheckpointInfo, engine: str) -> None:
    """Refuse a path in which vLLM would find another method, and a file that the engine does not load."""
    path = str(info.directory.resolve())
    word = next((word for word in METHOD_WORDS if word in path.lower()), None)
    if word is not None:
        raise UserError(
            f"{path}: vLLM takes a draft model with {word!r} anywhere in its path for another method; expected a path "
            f"without {', '.join(METHOD_WORDS)}"
        )
    if engine == "arctic" and not (info.directory / WEIGHTS_FILE).is_file():
        raise UserError(f"{info.directory}: no {WEIGHTS_FILE}; expected verl-speculator export --format arctic")


def _check_sync_setting(name: str, value: Any) -> None:
    """Refuse a setting with which no newer speculator would reach the rollout."""
    accepted, reason = SYNC_REQUIREMENTS.get(name, ((value,), ""))
    if value not in accepted:
        raise UserError(f"{name}={value}: {reason}; expected {' or '.join(map(str, accepted))}")


def _check_base(info: CheckpointInfo, base: str) -> None:
    """Refuse a base model of another shape or other weights than the speculator's."""
    info.check_base(*base_shape(base))
    info.check_base_weights(base)


def _check_installed(engine: str) -> list[str]:
    """Refuse installed versions that cannot serve; a note if none is installed."""
    version = installed_vllm()
    needed = {"arctic": "0.26.0", "vllm-medusa": "0.24 to 0.32"}.get(engine, "0.24 to 0.33")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise UserError(f"VLLM_USE_V2_MODEL_RUNNER=1: --engine {engine} drafts in vLLM's V1 runner alone; expected 0")
    if version is None:
        extra = "arctic-inference==0.3.0" if engine == "arctic" else "verl_speculator[vllm]"
        return [f"vLLM is not installed here; where the rollout runs it needs {needed}: pip install {extra}"]
    if engine == "vllm":
        check_version(version)
    elif engine == "vllm-medusa" and not (0, 24) <= minor_version(version) <= (0, 32):
        raise UserError(f"vllm {version}: Medusa heads are read by {needed}; expected one of these, or --engine vllm")
    elif engine == "arctic":
        try:
            metadata.version("arctic-inference")
        except metadata.PackageNotFoundError:
            raise UserError(
                "--engine arctic: arctic-inference is not installed; expected pip install arctic-inference==0.3.0"
            ) from None
        if minor_version(version) != (0, 26):
            raise UserError(f"vllm {version}: ArcticInference 0.3.0 needs 0.26.0; expected that, or --engine vllm")
    return []


def _required_settings(info: CheckpointInfo, engine: str, purpose: str, train: bool) -> dict[str, Setting]:
    """Every setting that decides whether the trained weights draft."""
    path, is_proposer = str(info.directory.resolve()), engine == "vllm"
    n_predict = info.config.n_predict
    settings = {
        ROLLOUT + "name": Setting("vllm", "the speculator would not be served"),
        SPECULATION + "method": Setting(METHODS[engine], "another drafter would run", new=True),
        SPECULATION + "model": Setting(PROPOSER if is_proposer else path, "another drafter would run", new=True),
        SPECULATION + "num_speculative_tokens": Setting(
            n_predict, "it was trained to draft as many as its n_predict", new=True
        ),
    }
    if is_proposer:
        settings[f"{SERVER}additional_config.{KEY}.path"] = Setting(path, "another checkpoint would draft", new=True)
    if purpose == "generation":
        settings[ROLLOUT + "load_format"] = Setting("auto", "the base that answers would have random weights")
    elif not is_proposer:
        # The target model gets the trainer's weights before the first rollout; a drafter of vLLM's own never does.
        settings[ROLLOUT + "load_format"] = Setting("auto", "the speculator would have random weights")
        if engine == "vllm-medusa":  # ArcticInference saves its drafter before a sleep of level 2
            settings[ROLLOUT + "free_cache_engine"] = Setting(
                False, "a sleeping engine gives the speculator's weights back and wakes up with none"
            )
    if is_proposer and purpose == "ppo":
        extension = SERVER + "worker_extension_cls"
        settings[extension] = Setting.for_sync(extension, new=True)
    if train:  # the reference has the actor's values unless it is set apart
        settings[STRATEGY] = Setting.for_sync(STRATEGY)
        settings[MODEL + "_target_"] = Setting(POLICY, "verl's own configuration refuses a speculator")
        settings[MODEL + "model_type"] = Setting.for_sync(MODEL + "model_type", new=True)
        settings[MODEL + "speculator.path"] = Setting(path, "the actor would train another speculator", new=True)
        settings[MODEL + "speculator.train"] = Setting(True, "the speculator would not follow the policy", new=True)
    if engine == "arctic" and purpose == "ppo":
        settings[f"ray_kwargs.ray_init.runtime_env.env_vars.{ARCTIC_SWITCH}"] = Setting(
            "1", "ArcticInference would stay switched off", new=True
        )
    return settings


def _check_overrides(
    overrides: Sequence[str], required: Mapping[str, Setting], info: CheckpointInfo, train: bool
) -> set[str]:
    """Refuse overrides of the user that contradict the required settings, and another base model; the keys they set."""
    keys = set()
    for override in overrides:
        match = _OVERRIDE.match(override)
        if match is None:
            raise UserError(f"{override!r} is not an override: expected key=value")
        key, value = match["key"].strip(), _parse_value(match["value"])
        setting = required.get(key)
        if setting is not None and value != setting.value:
            raise UserError(f"{key}={match['value']}: {setting.reason}; expected {quote(setting.value)}")
        if train:
            _check_sync_setting(key, value)
        if key == BASE and isinstance(value, str):
            _check_base(info, value)
        keys.add(key)
    return keys


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
        engine: vllm (our drafter), arctic or vllm-medusa.
        purpose: ppo (`verl.trainer.main_ppo`) or generation (`verl.trainer.main_generation_server`).
        train: the actor trains the speculator and sends it to the rollout (`verl_speculator.train_ppo`).
        overrides: the user's, which are checked against the required ones.

    Raises:
        UserError: for an engine that cannot serve the speculator (with what to train instead), a path that vLLM would
            misread, versions that cannot serve it, and overrides with which other weights than the trained would draft.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    if purpose not in PURPOSES:
        raise UserError(f"--for {purpose}: expected one of {', '.join(PURPOSES)}{nearest(purpose, PURPOSES)}")
    if train and (engine, purpose) != ("vllm", "ppo"):
        raise UserError(
            f"--train with --engine {engine} --for {purpose}: only our own drafter takes over a newer speculator; "
            "expected --engine vllm --for ppo"
        )
    if (unsupported_reason := ENGINES[engine](info.config)) is not None:
        raise UserError(f"--engine {engine}: cannot serve {info.directory}: {unsupported_reason}")
    if engine != "vllm":
        _check_path(info, engine)
    required = _required_settings(info, engine, purpose, train)
    user_keys = _check_overrides(overrides, required, info, train)
    notes = _check_installed(engine)
    if engine == "vllm":
        notes.append(
            "vLLM 0.24 leaves the speculator out of its memory account: where memory is scarce, lower "
            f"{ROLLOUT}gpu_memory_utilization by its size"
        )
    if engine == "arctic":
        notes += ARCTIC_NOTES
        if purpose == "generation":
            notes.append(f"export {ARCTIC_SWITCH}=1: verl's generation server hands no other variables to its workers")
    if train:
        notes.append("start python -m verl_speculator.train_ppo in place of python -m verl.trainer.main_ppo")
    if BASE not in user_keys:
        notes.append(f"no {BASE}=… among your overrides: the speculator was not held against its base")
    required = {key: setting for key, setting in required.items() if key not in user_keys}
    printed = [f"{'+' * setting.new}{key}={quote(setting.value)}" for key, setting in required.items()]
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
    for name in SYNC_REQUIREMENTS:
        _check_sync_setting(name, OmegaConf.select(config, name))
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
    return _check_installed("vllm")
