"""`rollout-args`: overrides that verl's own configuration accepts, and what would draft with random weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig
from typer.testing import CliRunner

from helpers.vllm_runner import install
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.__main__ import app
from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.interop.export import export_speculator
from verl_speculator.rl.rollout_args import PURPOSES, quote, rollout_arguments
from verl_speculator.utils.settings import UserError

ROLLOUT = "actor_rollout_ref.rollout."
SERVER = ROLLOUT + "engine_kwargs.vllm."
SPECULATION = SERVER + "speculative_config."
PATH = SERVER + "additional_config.verl_speculator.path"
LOSSY = SPECULATION + "rejection_sample_method"
DUMMY, FREED = ROLLOUT + "load_format=dummy", ROLLOUT + "free_cache_engine=True"
SETTINGS = {
    "sum_rnn": {},
    "sum_lstm": {"method": "sum_lstm", "tie_lstm_embs": True},
    "medusa": {"method": "medusa", "inner_dim": None},
}


@pytest.fixture(scope="module")
def specs(tmp_path_factory, base):
    """One checkpoint a family, in a directory whose name Hydra has to be told about."""
    found = {}
    width, vocab = base_shape(base)
    for name, settings in SETTINGS.items():
        config = SpeculatorConfig(**({"n_predict": 3, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8} | settings))
        speculator = build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0)
        for key, parameter in speculator.named_parameters():
            if key in speculator.constants():
                parameter.data.add_(0.5)  # as if it were trained
        folder = tmp_path_factory.mktemp("a run's, {odd}=name") / name
        found[name] = save_speculator(speculator, folder, base_architectures=["Qwen2ForCausalLM"])
        export_speculator(read_checkpoint_info(folder), "vllm", folder.parent / "v2" / name)
    return found


def of_engine(specs, engine, family):
    """What an engine is pointed at: a checkpoint, or for the V2 runner its export."""
    path = specs[family]
    return read_checkpoint_info(path.parent / "v2" / family if engine == "vllm-v2" else path)


def ppo(overrides):
    """verl's own configuration with these overrides."""
    verl = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
    with initialize_config_dir(str(verl / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def served(config) -> dict:
    return OmegaConf.to_container(OmegaConf.select(config, SERVER[:-1]), resolve=True)


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(
    ("engine", "family"),
    [(e, f) for e in ("vllm", "vllm-v2") for f in SETTINGS] + [("arctic", "sum_lstm"), ("vllm-medusa", "medusa")],
)
def test_verl_accepts_every_override(specs, engine, family, purpose):
    info = of_engine(specs, engine, family)
    config = ppo(
        rollout_arguments(info, engine=engine, purpose=purpose, overrides=["data.train_batch_size=7"]).overrides
    )
    path, own = str(info.directory), engine == "vllm"
    assert Path(path).is_absolute() and config.data.train_batch_size == 7
    rollout = config.actor_rollout_ref.rollout
    assert rollout.name == "vllm"
    proposer = "verl_speculator.vllm_plugin.proposer.SpeculatorProposer"
    v2 = {"num_speculative_tokens_per_batch_size": [[1, 32, 3], [33, 2**20, 0]]}
    if purpose == "ppo":
        v2["draft_load_config"] = {"load_format": "auto"}
    assert served(config)["speculative_config"] == {
        "method": {"vllm": "custom_class", "vllm-v2": "mtp", "arctic": "arctic", "vllm-medusa": "medusa"}[engine],
        "model": proposer if own else path,
        "num_speculative_tokens": 3,
        **(v2 if engine == "vllm-v2" else {}),
    }
    assert served(config).get("additional_config") == ({"verl_speculator": {"path": path}} if own else None)
    # dummy is right only where the trainer's weights come before the first answer, and the drafter is loaded apart.
    assert rollout.load_format == (
        "dummy" if engine.startswith("vllm") and engine != "vllm-medusa" and purpose == "ppo" else "auto"
    )
    # A draft model that vLLM holds loses its weights in a sleep of level 2.
    assert rollout.free_cache_engine == (engine not in ("vllm-v2", "vllm-medusa") or purpose == "generation")
    extension = "verl_speculator.vllm_plugin.worker.VerlSpeculatorWorkerExtension"
    assert served(config).get("worker_extension_cls") == (extension if own and purpose == "ppo" else None)
    if engine == "arctic" and purpose == "ppo":
        assert config.ray_kwargs.ray_init.runtime_env.env_vars.ARCTIC_INFERENCE_ENABLED == "1"


@pytest.mark.filterwarnings("ignore")
def test_verl_makes_vllms_arguments_of_them(specs):
    """verl writes a dict as JSON and anything else as text: our nested settings have to arrive as dicts."""
    from verl.utils.config import omega_conf_to_dataclass

    config = ppo(rollout_arguments(read_checkpoint_info(specs["sum_rnn"])).overrides)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    given = rollout.engine_kwargs["vllm"]
    for key in ("speculative_config", "additional_config"):
        assert isinstance(given[key], dict) and json.loads(json.dumps(given[key])) == given[key]


def test_values_survive_hydra():
    odd = [
        "/plain/path-1.0",
        "with space",
        "it's",
        "a=b,c",
        "{x}",
        "[1]",
        "\\'",
        "ünï",
        "1",
        "true",
        "$HOME",
        "a:b",
        "(c)",
    ]
    overrides = [f"+values.v{i}={quote(value)}" for i, value in enumerate(odd)]
    assert list(ppo(overrides)["values"].values()) == odd


def refusal(info, **settings) -> str:
    with pytest.raises(UserError) as error:
        rollout_arguments(info, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("medusa", {"engine": "vllm-medusa", "overrides": [DUMMY]}, "the speculator would have random weights"),
        ("sum_rnn", {"engine": "arctic", "overrides": [DUMMY]}, "random weights; expected auto"),
        ("sum_rnn", {"purpose": "generation", "overrides": [DUMMY]}, "the base that answers would have random weights"),
        ("medusa", {"engine": "vllm-medusa", "overrides": [FREED]}, "gives the speculator's weights back"),
        ("sum_rnn", {"overrides": [f"+{SPECULATION}num_speculative_tokens=5"]}, "as its n_predict; expected 3"),
        ("sum_rnn", {"overrides": [f"+{PATH}=runs/one"]}, "another checkpoint would draft"),
        ("medusa", {"engine": "vllm-medusa", "overrides": [f"++{SPECULATION}model=x"]}, "another drafter would run"),
        ("sum_rnn", {"overrides": [ROLLOUT + "name=sglang"]}, "the speculator would not be served; expected vllm"),
        ("sum_rnn", {"overrides": [f"~{ROLLOUT}name=vllm"]}, "the speculator would not be served; expected vllm"),
        ("sum_rnn", {"overrides": [f"+{LOSSY}=synthetic"]}, "the rollout would not be the policy's"),
        ("sum_rnn", {"engine": "arctic", "overrides": [f"+{LOSSY}=fly"]}, "expected standard or block"),
        ("sum_rnn", {"overrides": ["nonsense"]}, "'nonsense' is not an override"),
        ("sum_rnn", {"engine": "vllm-medusa"}, "method=sum_rnn: no released version serves it by itself; train medusa"),
        ("medusa", {"engine": "arctic"}, "it serves sum_rnn and sum_lstm"),
        ("sum_rnn", {"engine": "artic"}, "did you mean 'arctic'"),
        ("sum_rnn", {"purpose": "pp"}, "--for pp: expected one of ppo, generation"),
        ("sum_rnn", {"overrides": ["actor_rollout_ref.model.path=/no/such"]}, "base=/no/such: no such directory"),
    ],
)
def test_refusals(specs, family, settings, words):
    assert words in refusal(read_checkpoint_info(specs[family]), **settings)


def test_verification_that_keeps_the_text_is_the_users_choice(specs):
    info = read_checkpoint_info(specs["sum_rnn"])
    lossy = f"+{LOSSY}=synthetic"
    assert lossy in rollout_arguments(info, purpose="generation", overrides=[lossy]).overrides
    for own in (f"+{LOSSY}=block", f"+{SPECULATION}draft_sample_method=probabilistic"):
        assert own in rollout_arguments(info, overrides=[own]).overrides


def test_data_parallel_engines_verify_drafts_in_a_batch_of_any_size(specs):
    export, parallel = of_engine(specs, "vllm-v2", "sum_rnn"), ROLLOUT + "data_parallel_size="

    def notes(engine, *overrides):
        info = export if engine == "vllm-v2" else read_checkpoint_info(specs["sum_rnn"])
        every = rollout_arguments(info, engine=engine, overrides=overrides).notes
        return [note for note in every if "num_speculative_tokens_per_batch_size" in note]

    (note,) = notes("vllm-v2", parallel + "2")
    assert note.startswith(parallel + "2: vLLM then ignores ")
    assert not notes("vllm-v2") and not notes("vllm-v2", parallel + "1") and not notes("vllm-v1", parallel + "2")


def test_the_same_value_again_is_fine(specs):
    info = read_checkpoint_info(specs["medusa"])
    own = [ROLLOUT + "load_format='auto'", ROLLOUT + "free_cache_engine=False", "+x.y=1"]
    overrides = rollout_arguments(info, engine="vllm-medusa", overrides=own).overrides
    assert overrides[-3:] == own and sum("load_format" in override for override in overrides) == 1
    assert rollout_arguments(read_checkpoint_info(specs["sum_rnn"]), overrides=[ROLLOUT + "load_format=dummy"])


def test_the_base_that_is_trained_has_to_be_the_speculators(specs, bases, tmp_path):
    other = [f"actor_rollout_ref.model.path={bases['gemma2']}"]
    config = SpeculatorConfig(n_predict=3, inner_dim=8, emb_dim=8, proj_dim=8)
    save_speculator(build_speculator(config, hidden_size=16, vocab_size=40, seed=0), tmp_path)
    assert "trained for a base of width (hidden_size) 16, this base has 32" in refusal(
        read_checkpoint_info(tmp_path), overrides=other
    )


@pytest.mark.parametrize("word", ["EAGLE-3b", "my-eagle3", "xdflashx", "dspark"])
def test_paths_that_vllm_would_misread(word, tmp_path):
    config = SpeculatorConfig(method="medusa", n_predict=2)
    for path in (tmp_path / word, tmp_path / word / "spec"):
        save_speculator(build_speculator(config, hidden_size=16, vocab_size=40, seed=0), path)
        told = refusal(read_checkpoint_info(path), engine="vllm-medusa")
        assert "for another method; expected a path without eagle-, eagle3, dflash, dspark" in told
        assert rollout_arguments(read_checkpoint_info(path))  # our drafter's path is no draft model's


@pytest.fixture(scope="module")
def draft(base, tmp_path_factory):
    """An EAGLE-3 draft of the base model in a directory of that name, and its export."""
    config = SpeculatorConfig(method="eagle3", n_predict=3, draft_vocab_size=20, head="own")
    width, vocab = base_shape(base)
    shape = {"hidden_size": width, "vocab_size": vocab, "draft_tokens": list(range(20))}
    folder = tmp_path_factory.mktemp("eagle3") / "my-eagle3"
    save_speculator(build_speculator(config.for_base(AutoConfig.from_pretrained(base)), **shape, seed=0), folder)
    export_speculator(read_checkpoint_info(folder), "vllm-eagle3", folder.parent / "export-eagle3")
    return folder, folder.parent / "export-eagle3"


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(
    ("version", "apart", "has_gate"), [(None, True, False), ("0.28.0", True, False), ("0.30.0", False, True)]
)
def test_eagle3_in_vllms_own_drafter(version, apart, has_gate, purpose, draft, monkeypatch):
    """In either runner; the V2 runner loads a drafter apart from 0.31 on, and the V1 runner always."""
    if version is not None:
        install(monkeypatch, version)
    arguments = rollout_arguments(read_checkpoint_info(draft[1]), purpose=purpose)
    assert arguments.notes[0] == "--engine vllm-eagle3, since vLLM itself serves eagle3"
    config = ppo(arguments.overrides)
    expected = {"method": "eagle3", "model": str(draft[1]), "num_speculative_tokens": 3}
    if has_gate:
        expected["num_speculative_tokens_per_batch_size"] = [[1, 32, 3], [33, 2**20, 0]]
    if apart and purpose == "ppo":
        expected["draft_load_config"] = {"load_format": "auto"}
    assert served(config) == {"speculative_config": expected}
    rollout = config.actor_rollout_ref.rollout
    assert rollout.load_format == ("dummy" if apart and purpose == "ppo" else "auto")
    assert rollout.free_cache_engine == (purpose == "generation")


def test_what_eagle3_needs(draft, specs, monkeypatch):
    info, export = map(read_checkpoint_info, draft)
    assert "expected the directory of `verl-speculator export" in refusal(info)
    assert "--format vllm-eagle3 --out DIR`" in refusal(info, engine="vllm-eagle3")
    for engine in ("arctic", "vllm-medusa", "vllm-v1", "vllm-v2"):
        assert "vLLM serves eagle3 by itself: --format vllm-eagle3" in refusal(export, engine=engine)
    assert "method=medusa: it serves eagle3" in refusal(read_checkpoint_info(specs["medusa"]), engine="vllm-eagle3")
    assert "--train with --engine vllm-eagle3: vLLM's own drafter receives no newer" in refusal(export, train=True)
    assert "gives the speculator's weights back" in refusal(export, overrides=[FREED])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    install(monkeypatch, "0.32.0")
    lines = rollout_arguments(export).overrides
    assert any("per_batch_size=" in line for line in lines) and any("draft_load_config" in line for line in lines)
    install(monkeypatch, "0.33.0")
    assert "vllm 0.33.0: --engine vllm-eagle3 needs 0.24 to 0.32" in refusal(export)


def test_relative_paths_become_absolute(specs, monkeypatch):
    monkeypatch.chdir(specs["sum_rnn"].parent)
    overrides = rollout_arguments(read_checkpoint_info("sum_rnn")).overrides
    assert served(ppo(overrides))["additional_config"]["verl_speculator"]["path"] == str(specs["sum_rnn"])


def test_what_arctic_asks_for(specs, tmp_path):
    config = read_checkpoint_info(specs["sum_rnn"]).config
    speculator = build_speculator(config, hidden_size=16, vocab_size=40, seed=0)
    save_speculator(speculator, tmp_path)
    # 0.3.0 does not compare base_model_archs with the base, and brings the drafter through a sleep of level 2.
    freed = [ROLLOUT + "free_cache_engine=true"]
    arguments = rollout_arguments(read_checkpoint_info(tmp_path), engine="arctic", overrides=freed)
    assert not any(o.startswith(ROLLOUT + "free_cache_engine=false") for o in arguments.overrides)
    (limit,) = (note for note in arguments.notes if "64" in note)
    assert "speculative_config.disable_by_batch_size=" in limit
    assert ppo([*arguments.overrides, f"+{SPECULATION}disable_by_batch_size=128"])
    assert any("vLLM 0.26.0" in note and "0.24.0" in note for note in arguments.notes)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    assert "expected verl-speculator export --format arctic" in refusal(read_checkpoint_info(tmp_path), engine="arctic")


def test_versions_that_are_installed(specs, monkeypatch):
    info = {name: read_checkpoint_info(path) for name, path in specs.items()}
    chosen, install_it, *_ = rollout_arguments(info["sum_rnn"]).notes
    assert chosen.startswith("--engine vllm-v1, since vLLM is not installed here")
    assert "pip install verl_speculator[vllm]" in install_it
    assert "arctic-inference==0.3.0" in rollout_arguments(info["sum_rnn"], engine="arctic").notes[0]
    install(monkeypatch, "0.33.0")
    export = of_engine(specs, "vllm-v2", "sum_rnn")
    arguments = rollout_arguments(export)
    assert arguments.notes[0].startswith("--engine vllm-v2, since vLLM 0.33.0 runs its V2 runner unless")
    assert any(line.endswith(".method=mtp") for line in arguments.overrides)
    assert "--engine vllm-v2 loads an export; expected the directory of `verl-speculator export" in refusal(
        info["sum_rnn"]
    )
    note = rollout_arguments(info["sum_rnn"], engine="vllm-v1").notes[0]
    assert note.startswith("export VLLM_USE_V2_MODEL_RUNNER=0 where the rollout runs: vLLM 0.33.0")
    assert "only our own drafter in the V1 runner receives newer" in refusal(export, train=True)
    assert "vllm 0.33.0: --engine vllm-medusa needs 0.24 to 0.32" in refusal(info["medusa"], engine="vllm-medusa")
    assert "arctic-inference is not installed" in refusal(info["sum_rnn"], engine="arctic")
    install(monkeypatch, "0.23.0")
    assert "vllm 0.23.0: verl_speculator.vllm_plugin.proposer" in refusal(info["sum_rnn"])
    install(monkeypatch, "0.26.0")
    assert "--engine vllm-v2 needs 0.28 to 0.33" in refusal(export, engine="vllm-v2")
    install(monkeypatch, "0.30.0")
    assert f"{ROLLOUT}load_format=auto" in rollout_arguments(export).overrides  # it would ignore draft_load_config
    assert "the speculator would have random weights" in refusal(export, overrides=[DUMMY])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    message = refusal(info["sum_rnn"], engine="vllm-v1")
    assert "VLLM_USE_V2_MODEL_RUNNER=1: --engine vllm-v1 drafts in vLLM's V1 runner alone; expected 0" in message
    install(monkeypatch, "0.28.0")
    assert rollout_arguments(export).notes[0] == "--engine vllm-v2, since VLLM_USE_V2_MODEL_RUNNER=1"


def test_the_command(specs, tmp_path):
    own = "data.train_batch_size=7"
    result = CliRunner().invoke(app, ["rollout-args", str(specs["sum_rnn"]), "--for", "generation", own])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert ppo(lines).data.train_batch_size == 7 and lines[-1] == own
    assert all(line.startswith("note: ") for line in result.stderr.splitlines()) and result.stderr
    config = SpeculatorConfig(n_predict=2, inner_dim=8, emb_dim=8, proj_dim=8)
    save_speculator(build_speculator(config, hidden_size=12, vocab_size=30, seed=0), tmp_path)
    result = CliRunner().invoke(app, ["rollout-args", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "no training step has changed its tensors" in str(result.exception)
    assert CliRunner().invoke(app, ["rollout-args", str(tmp_path), "--allow-untrained"]).exit_code == 0
