"""The overrides by which verl's rollout decodes with a speculator, and what is refused. Imports no torch.

Read from verl 0.9.1, whose rollout starts a vLLM server from `actor_rollout_ref.rollout` (docs/serving-engines.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import WEIGHTS_FILE, CheckpointInfo
from verl_speculator.interop.engine_formats import arctic_obstacle, medusa_obstacle, proposer_obstacle
from verl_speculator.utils.errors import UserError, nearest
from verl_speculator.vllm_plugin.compat import KEY, PROPOSER, check_version, installed_vllm

ENGINES = {"vllm": proposer_obstacle, "arctic": arctic_obstacle, "vllm-medusa": medusa_obstacle}
PURPOSES = ("ppo", "generation")
MODEL = "actor_rollout_ref.model."
ROLLOUT = "actor_rollout_ref.rollout."
SERVER = ROLLOUT + "engine_kwargs.vllm."
SPECULATION = SERVER + "speculative_config."
BASE = MODEL + "path"
STRATEGY = "actor_rollout_ref.actor.strategy"
ARCTIC_SWITCH = "ARCTIC_INFERENCE_ENABLED"
MODEL_TYPE = "language_model_with_speculator"
POLICY = "verl_speculator.training.model_config.SpeculatorPolicyConfig"
# Of verl's trainers, those whose actors share a machine with the rollout.
TRAINERS = ("sync", "colocate_async")
WORKER_EXTENSION = "verl_speculator.vllm_plugin.verl_worker.VerlSpeculatorWorkerExtension"
# For a speculator that follows the policy: each setting with what it may be, and what another value would do.
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
    "trainer.v1.trainer_mode": (TRAINERS, "its rollouts have no actor beside them"),
}
# Read from ArcticInference 0.3.0 (vllm/config.py, pyproject.toml) and verl 0.9.1.
ARCTIC_NOTES = (
    "ArcticInference 0.3.0 needs vLLM 0.26.0 exactly, where verl 0.9.1's own extra pins 0.24.0",
    f"ArcticInference drafts for at most 64 requests at a time: +{SPECULATION}disable_by_batch_size=N raises that",
)
# What vLLM looks for in the path of a draft model, and takes for its method whatever the method says.
TAKEN_FOR_METHODS = ("eagle-", "eagle3", "dflash", "dspark")
_OVERRIDE = re.compile(r"^(?P<sign>\+{0,2}|~)(?P<key>[^=~+]+)=(?P<value>.*)$", re.DOTALL)
_PLAIN = re.compile(r"[\w./\-+@%*]+", re.ASCII)


@dataclass(frozen=True)
class Setting:
    """A value that must be so.

    Attributes:
        value: as Hydra reads it.
        why: what another value would do.
        new: whether verl's configuration has no such key.
    """

    value: Any
    why: str
    new: bool = False


@dataclass(frozen=True)
class Arguments:
    """What `verl-speculator rollout-args` prints.

    Attributes:
        overrides: Hydra's, one each.
        notes: what else there is to do.
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


def _check_path(info: CheckpointInfo, path: str, engine: str) -> None:
    """Refuse a path that vLLM reads a method from, and a file that the engine does not load."""
    found = next((word for word in TAKEN_FOR_METHODS if word in path.lower()), None)
    if found is not None:
        raise UserError(
            f"{path}: vLLM takes a draft model with {found!r} anywhere in its path for another method; expected a path "
            f"without {', '.join(TAKEN_FOR_METHODS)}"
        )
    if engine == "arctic" and not (info.directory / WEIGHTS_FILE).is_file():
        raise UserError(f"{info.directory}: no {WEIGHTS_FILE}; expected verl-speculator export --format arctic")


def check_followed(name: str, value: Any) -> None:
    """Refuse a setting under which no newer speculator would reach the rollout.

    Raises:
        UserError: naming it, and what it may be.
    """
    accepted, why = SYNC_REQUIREMENTS.get(name, ((value,), ""))
    if value not in accepted:
        raise UserError(f"{name}={value}: {why}; expected {' or '.join(map(str, accepted))}")


def check_installed(engine: str) -> list[str]:
    """Refuse versions here that cannot do it; say so where there are none."""
    version, needed = installed_vllm(), {"arctic": "0.26.0", "vllm-medusa": "0.24 to 0.32"}.get(engine, "0.24 to 0.33")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise UserError(f"VLLM_USE_V2_MODEL_RUNNER=1: --engine {engine} drafts in vLLM's V1 runner alone; expected 0")
    if version is None:
        extra = "arctic-inference==0.3.0" if engine == "arctic" else "verl_speculator[vllm]"
        return [f"vLLM is not installed here; where the rollout runs it needs {needed}: pip install {extra}"]
    if engine == "vllm":
        check_version(version)
    elif engine == "arctic":
        _check_arctic(version)
    elif not (0, 24) <= _minor(version) <= (0, 32):
        raise UserError(f"vllm {version}: Medusa heads are read by {needed}; expected one of these, or --engine vllm")
    return []


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _check_arctic(version: str) -> None:
    try:
        metadata.version("arctic-inference")
    except metadata.PackageNotFoundError:
        raise UserError(
            "--engine arctic: arctic-inference is not installed; expected pip install arctic-inference==0.3.0"
        ) from None
    if _minor(version) != (0, 26):
        raise UserError(f"vllm {version}: ArcticInference 0.3.0 needs 0.26.0; expected that, or --engine vllm")


def _needed(info: CheckpointInfo, engine: str, purpose: str, train: bool) -> dict[str, Setting]:
    """Every setting that decides whether the trained weights draft."""
    path, own = str(info.directory.resolve()), engine == "vllm"
    method = {"vllm": "custom_class", "arctic": "arctic", "vllm-medusa": "medusa"}[engine]
    random_base = "the base that answers would have random weights"
    random_draft = "the speculator would have random weights"
    settings = {
        ROLLOUT + "name": Setting("vllm", "the speculator would not be served"),
        SPECULATION + "method": Setting(method, "another drafter would run", new=True),
        SPECULATION + "model": Setting(PROPOSER if own else path, "another drafter would run", new=True),
        SPECULATION + "num_speculative_tokens": Setting(
            info.config.n_predict, "it was trained to draft as many as its n_predict", new=True
        ),
    }
    if own:
        settings[f"{SERVER}additional_config.{KEY}.path"] = Setting(path, "another checkpoint would draft", new=True)
    if purpose == "generation":
        settings[ROLLOUT + "load_format"] = Setting("auto", random_base)
    elif not own:
        # The base gets the trainer's weights before the first rollout; a drafter in vLLM's hands never does.
        settings[ROLLOUT + "load_format"] = Setting("auto", random_draft)
        if engine == "vllm-medusa":  # ArcticInference saves its drafter before a sleep of level 2
            settings[ROLLOUT + "free_cache_engine"] = Setting(
                False, "a sleeping engine gives the speculator's weights back and wakes up with none"
            )
    if own and purpose == "ppo":
        settings[SERVER + "worker_extension_cls"] = Setting(
            WORKER_EXTENSION, "the rollout could not take over a newer speculator", new=True
        )
    if train:
        # The reference has the actor's, unless it is told otherwise.
        settings[STRATEGY] = Setting("fsdp2", "a policy with a speculator is sharded by FSDP2 alone")
        settings[MODEL + "_target_"] = Setting(POLICY, "verl's own configuration refuses a speculator")
        settings[MODEL + "model_type"] = Setting(MODEL_TYPE, "the actor would have no speculator", new=True)
        settings[MODEL + "speculator.path"] = Setting(path, "the actor would train another speculator", new=True)
        settings[MODEL + "speculator.train"] = Setting(True, "the speculator would not follow the policy", new=True)
    if engine == "arctic" and purpose == "ppo":
        settings[f"ray_kwargs.ray_init.runtime_env.env_vars.{ARCTIC_SWITCH}"] = Setting(
            "1", "ArcticInference would stay switched off", new=True
        )
    return settings


def _value(text: str) -> Any:
    """What Hydra makes of a value, as far as it matters for a comparison."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1].replace("\\'", "'")
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"\d+", text) else text


def _check_own(overrides: Sequence[str], needed: Mapping[str, Setting], info: CheckpointInfo, train: bool) -> None:
    """Hold the user's overrides against what must be so, and the base that they name against the speculator's."""
    for override in overrides:
        match = _OVERRIDE.match(override)
        if match is None:
            raise UserError(f"{override!r} is not an override: expected key=value")
        key, value = match["key"].strip(), _value(match["value"])
        setting = needed.get(key)
        if setting is not None and value != setting.value:
            raise UserError(f"{key}={match['value']}: {setting.why}; expected {quote(setting.value)}")
        if train:
            check_followed(key, value)
        if key == BASE and isinstance(value, str):
            info.check_base(*base_shape(value))
            info.check_base_weights(value)


def rollout_arguments(
    info: CheckpointInfo,
    *,
    engine: str = "vllm",
    purpose: str = "ppo",
    train: bool = False,
    overrides: Sequence[str] = (),
) -> Arguments:
    """The overrides for verl's PPO trainer or its generation server, with the user's own behind them.

    Args:
        info: the checkpoint.
        engine: vllm (our drafter), arctic or vllm-medusa.
        purpose: ppo (`verl.trainer.main_ppo`) or generation (`verl.trainer.main_generation_server`).
        train: have the actor train the speculator, and the rollout take it over (`verl_speculator.train_ppo`).
        overrides: the user's own, to be held against the others.

    Raises:
        UserError: for an engine that cannot serve the speculator (and what to train instead), a path that would be
            misread, versions that cannot do it, and settings under which other weights than the trained would draft.
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
    unsupported_reason = ENGINES[engine](info.config)
    if unsupported_reason is not None:
        raise UserError(f"--engine {engine}: cannot serve {info.directory}: {unsupported_reason}")
    if engine != "vllm":
        _check_path(info, str(info.directory.resolve()), engine)
    needed = _needed(info, engine, purpose, train)
    _check_own(overrides, needed, info, train)
    notes = check_installed(engine)
    if engine == "vllm":
        notes.append(
            "vLLM 0.24 leaves the speculator out of its memory account: where memory is scarce, lower "
            f"{ROLLOUT}gpu_memory_utilization by its size"
        )
    if engine == "arctic":
        notes += ARCTIC_NOTES
    if engine == "arctic" and purpose == "generation":
        notes.append(f"export {ARCTIC_SWITCH}=1: verl's generation server hands no other variables to its workers")
    if train:
        notes.append("start python -m verl_speculator.train_ppo in place of python -m verl.trainer.main_ppo")
    own = {match["key"].strip() for match in map(_OVERRIDE.match, overrides) if match}
    if BASE not in own:
        notes.append(f"no {BASE}=… among your overrides: the speculator was not held against its base")
    printed = [
        f"{'+' if setting.new else ''}{key}={quote(setting.value)}" for key, setting in needed.items() if key not in own
    ]
    return Arguments([*printed, *overrides], notes)
