"""The commands of `diagnose`: files, exit codes, replaying, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import resource
import sys

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from helpers import buffered_moe
from helpers.buffered_moe import DRAFT, TARGET, BufferedMoE
from helpers.planted_faults import TOKENS, build, copied, greedy, run, with_buffers
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.__main__ import app
from verl_speculator.diagnose import compare, read_trace, trace
from verl_speculator.diagnose.experiments import bisect, import_external
from verl_speculator.diagnose.report import write
from verl_speculator.utils.atomic_io import TEMPORARY
from verl_speculator.utils.settings import UserError


def run_command(*arguments):
    """Exit code and output of a `diagnose` command."""
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def assert_refused(*arguments, message):
    """A `diagnose` command raises a user error of one line that contains `message`. Returns the line."""
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert message in str(result.exception) and "\n" not in str(result.exception), result.exception
    return str(result.exception)


@pytest.fixture(scope="module")
def speculator(base, tmp_path_factory):
    config = SpeculatorConfig(n_predict=2, inner_dim=16, emb_dim=16, proj_dim=16)
    made = build_speculator(
        config, hidden_size=32, vocab_size=json.loads((base / "config.json").read_text())["vocab_size"], seed=0
    )
    return save_speculator(made, tmp_path_factory.mktemp("diagnose") / "speculator")


def test_compare_command_same_and_other_tokens_write_their_verdicts(bases, base, speculator, tmp_path):
    a, b, c = (tmp_path / f"{name}.trace" for name in "abc")
    asked = ("trace", "--base", base, "--speculator", speculator, "--tokens", "5,9,23")
    assert run_command(*asked, "--out", a)[0] == run_command(*asked, "--out", b)[0] == 0
    code, shown = run_command("compare", a, b)
    assert code == 0 and shown.startswith("The runs are the same, bit for bit.")
    found = read_trace(a)
    assert found.tokens == (5, 9, 23) and len(found.notes["drafts"]) == 2 and len(found.top) == 5
    assert {call.name for call in found.calls} >= {"", "base", "base.model.layers.1.mlp", "speculator.proj.0.0"}
    assert found.environment["attention"] == "sdpa" and found.environment["threads"] == torch.get_num_threads()
    assert found.caches[0]["groups"][0]["layers"] == [0, 1] and found.caches[0]["groups"][0]["slots"] == 3
    assert not any(key.startswith("kept") for key in found.kept_tensors())
    assert run_command("trace", "--model", bases["llama"], "--tokens", "5,9,24", "--out", c)[0] == 0
    code, shown = run_command("compare", c, a, "--out", tmp_path / "out")
    assert code == 1 and "The inputs already differ at the start: the tokens" in shown
    assert "Weights differ" not in shown and "weights differ: " in shown
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert {"module", "input_difference", "output_difference", "mean_a", "std_b", "culprit"} <= set(table.columns)
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"divergence.{suffix}").stat().st_size > 1000


def test_compare_command_changed_mlp_is_marked_in_table_and_csv(tmp_path):
    model = build("llama")
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.1)
    found = run_command("compare", run(model, tmp_path / "a"), run(other, tmp_path / "b"))
    assert found[0] == 1 and found[1].startswith(
        "model.layers.1.mlp (call 0) is the first module whose inputs and weights"
    )
    for words in ("module", "metric", "A", "B", "difference", "model.layers.1.mlp ←", "std", "absmax", "top tokens:"):
        assert words in found[1]
    write(compare(read_trace(tmp_path / "a"), read_trace(tmp_path / "b")), tmp_path)
    table = pd.read_csv(tmp_path / "comparison.csv").set_index("module")
    row = table[(table["call"] == 0)].loc["model.layers.1.mlp"]
    assert row["culprit"] and row["input_difference"] == 0 and row["output_difference"] == pytest.approx(0.095, rel=0.4)


def test_trace_selected_modules_records_only_them_and_kept_ones(tmp_path):
    model = build("gpt_oss")
    run(model, tmp_path / "a", modules=["layers.*.mlp", "lm_head"], keep=["layers.1.mlp.router"])
    found = read_trace(tmp_path / "a")
    names = {call.name for call in found.calls}
    assert names == {*(f"model.layers.{i}.mlp" for i in range(3)), "model.layers.1.mlp.router", "lm_head"}
    assert {trace_call for trace_call in (found.calls[k["call"]].name for k in found.kept)} == {
        "model.layers.1.mlp.router"
    }
    assert all(name.startswith(("lm_head", "model.layers")) and "attn" not in name for name in found.weights)
    assert (tmp_path / "a").stat().st_size < 100_000


# Bisect


def test_bisect_overwritten_buffer_names_the_other_model(tmp_path):
    BufferedMoE.buffers.clear()
    draft = with_buffers(build("llama"), experts=4, seed=0)
    target = with_buffers(build("llama", hidden_size=64), experts=8, seed=9)
    run(draft, tmp_path / "a", keep=["layers.0.mlp"])
    found = bisect(read_trace(tmp_path / "a"), draft, "layers.0.mlp", disturb=lambda: greedy(target, TOKENS, 1))
    assert found.verdict == (
        "The output of model.layers.0.mlp changes after another model has run; none of what it calls does, so it is "
        "its own code."
    )
    by_name = {(v.module, v.name): v for v in found.variants}
    assert by_name["model.layers.0.mlp", "alone, fresh"].distance == 0
    assert "could not run: " in by_name["model.layers.0.mlp", "in float64"].note  # its buffer has a type of its own
    assert 0 < by_name["model.layers.0.mlp.router", "in float64"].distance < 1e-5
    assert not by_name["model.layers.0.mlp.router", "alone, fresh"].changes
    # A trace recorded after the target has run differs from a fresh run.
    run(draft, tmp_path / "b", keep=["layers.0.mlp"])
    BufferedMoE.buffers.clear()
    found = bisect(read_trace(tmp_path / "b"), copied(draft), "layers.0.mlp")
    assert found.verdict.startswith("The output of model.layers.0.mlp changes alone, fresh")


class ByBatch(nn.Module):
    """Depends on what else is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) - self.linear(x).mean(0)


def test_bisect_batch_dependent_submodule_is_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(ByBatch(), nn.Linear(8, 8)))
    with trace(model, tmp_path / "a", keep=["1"]), torch.no_grad():
        model(torch.randn(1, 5, 8))
    found = bisect(read_trace(tmp_path / "a"), model, "1")
    assert found.verdict == "The output of 1 changes in a batch of 4; of what it calls, so does that of 1.0."


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen2_moe"])
def test_bisect_deterministic_module_finds_nothing(name, tmp_path):
    model = build(name)
    run(model, tmp_path / "a", keep=["layers.0.mlp", "layers.0.input_layernorm"])
    for module in ("layers.0.mlp", "layers.0.input_layernorm"):
        found = bisect(read_trace(tmp_path / "a"), model, module, disturb=lambda: greedy(model, TOKENS, 1), call=1)
        assert found.agrees and "in float64" in found.verdict, found


def test_bisect_command_kept_module_finds_nothing_and_others_are_refused(base, bases, tmp_path):
    a = tmp_path / "a"
    run_command("trace", "--model", base, "--tokens", "5,9,23", "--out", a, "--keep", "layers.1.mlp")
    code, shown = run_command("bisect", a, "layers.1.mlp", "--model", base, "--after", bases["llama"])
    assert code == 0 and shown.startswith("Nothing changes the output of model.layers.1.mlp: not alone, fresh, nor")
    assert_refused(
        "bisect", a, "layers.0.mlp", "--model", base, message="kept no input of model.layers.0.mlp (it kept model."
    )
    assert_refused("bisect", a, "layers.1.mlp", "--model", base, "--call", 9, message="was called 3 times")


def test_solo_vs_pair_command_isolated_draft_is_the_same(base, bases, speculator, tmp_path):
    asked = ("solo-vs-pair", "--target", bases["llama"], "--tokens", "5,9,23", "--out", tmp_path / "out")
    code, shown = run_command(*asked, "--draft", base)
    assert code == 0 and shown.startswith("The draft is the same alone and after own, target: it drafts ")
    assert {path.name for path in (tmp_path / "out").glob("*.trace")} == {"alone.trace", "own.trace", "target.trace"}
    code, shown = run_command(*asked, "--base", base, "--speculator", speculator, "--num-draft", 2)
    assert code == 0 and shown.count(" drafts [") == 3


def test_solo_vs_pair_and_bisect_commands_overwritten_buffer_is_found(tmp_path):
    """A custom architecture, whose experts use a buffer that a larger target overwrites."""
    draft, target = (
        buffered_moe.write(tmp_path / n, s, i) for n, s, i in (("draft", DRAFT, 0), ("target", TARGET, 100))
    )
    BufferedMoE.buffers.clear()
    # Its buffers are in float32.
    asked = ("--tokens", "5,9,23,4,77,31,8,100", "--external-lib", buffered_moe.__file__, "--dtype", "fp32")
    code, shown = run_command("solo-vs-pair", "--draft", draft, "--target", target, "--out", tmp_path / "out", *asked)
    assert code == 1 and shown.startswith(
        "After target has run the draft is not the same; after own it is. model.layers.0.mlp (call 0) is the first "
        "module whose inputs and weights agree and whose output does not: no difference at its inputs"
    ), shown
    drafted = dict(re.findall(r"^  (\w+) +drafts (.*)$", shown, re.M))
    assert drafted["alone"] == drafted["own"] != drafted["target"]
    assert "alone against own: The runs are the same, bit for bit." in shown
    code, shown = run_command("compare", tmp_path / "out" / "alone.trace", tmp_path / "out" / "target.trace")
    assert code == 1 and "its 2 weights are the same" in shown
    BufferedMoE.buffers.clear()
    run_command("trace", "--model", draft, "--out", tmp_path / "a", "--keep", "layers.0.mlp", *asked)
    after = ("bisect", tmp_path / "a", "layers.0.mlp", "--model", draft, *asked[2:], "--after")
    code, shown = run_command(*after, draft)
    assert code == 0 and shown.startswith("Nothing changes the output of model.layers.0.mlp: ")
    code, shown = run_command(*after, target)
    assert code == 1 and shown.startswith(
        "The output of model.layers.0.mlp changes after another model has run; none of"
    )
    assert re.search(r"after another model has run +fresh +[\d.e+]+ +changes it", shown)


def test_import_external_failing_file_is_removed_from_sys_modules(tmp_path):
    (tmp_path / "own_kernels.py").write_text("PATCHED = True")
    import_external(str(tmp_path / "own_kernels.py"))
    assert sys.modules.pop("own_kernels").PATCHED
    import_external("json")
    (tmp_path / "broken_kernels.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"broken_kernels.py: cannot be imported: ZeroDivisionError: division by zero"):
        import_external(str(tmp_path / "broken_kernels.py"))
    assert "broken_kernels" not in sys.modules


# Bad input


def test_read_trace_damaged_file_is_refused(base, tmp_path):
    good = run(build("llama"), tmp_path / "good")
    data = good.read_bytes()
    for name, content, message in (
        ("cut", data[:-100], "cut off, or no trace"),
        ("shorter", data[:50], "cut off, or no trace"),
        ("empty", b"", "cut off, or no trace"),
        ("text", b"not a trace at all, but a longer text", "cut off, or no trace"),
        ("tensors", (base / "model.safetensors").read_bytes(), "a file of tensors, but no trace"),
        ("newer", data.replace(b'"version":"2"', b'"version":"7"'), "a trace of version 7, expected version 2"),
    ):
        (tmp_path / name).write_bytes(content)
        assert assert_refused("compare", good, tmp_path / name, message=message).startswith(str(tmp_path / name))
    assert_refused("compare", good, tmp_path / "nowhere", message="no such file; expected a trace")


def test_compare_command_without_shared_module_is_refused(tmp_path):
    run(build("llama"), tmp_path / "a")
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with trace(other, tmp_path / "b"):
        other(torch.randn(1, 4))
    assert_refused(
        "compare", tmp_path / "a", tmp_path / "b", message="share no module: the model, model, model.embed_tokens, …"
    )
    assert_refused(
        "compare", tmp_path / "a", tmp_path / "a", "--under-b", "model.layer.0", message="did you mean model.layers.0"
    )
    assert_refused(
        "compare",
        tmp_path / "a",
        tmp_path / "a",
        "--tolerance",
        "0",
        message="tolerance=0.0: expected a number above 0",
    )


def test_trace_command_unknown_module_is_refused_with_nearest_names(base, tmp_path):
    asked = ("trace", "--model", base, "--tokens", "5,9", "--out", tmp_path / "x")
    message = "modules=layer.0.mlp: matches no module of the model; did you mean model.layers.0.mlp, "
    assert_refused(*asked, "--modules", "layer.0.mlp", message=message)
    assert_refused(*asked, "--keep", "zzz", message="keep=zzz: matches no module of the model; it has model")
    assert not list(tmp_path.iterdir())


def test_trace_full_disk_is_refused_and_leaves_nothing(tmp_path):
    model, limits = build("llama"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        message = r"a trace of [\d,]+ bytes cannot be written: .*; nothing is left behind"
        with pytest.raises(UserError, match=message), trace(model, tmp_path / "a"), torch.no_grad():
            model(input_ids=TOKENS)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_trace_exception_leaves_no_file_and_no_hook(tmp_path):
    model = build("llama")
    with pytest.raises(ZeroDivisionError), trace(model, tmp_path / "a"):
        model(input_ids=TOKENS)
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir()) and not model._forward_hooks and not model.lm_head._forward_pre_hooks
    # A killed writer leaves a file of another name.
    (tmp_path / f"{TEMPORARY}1.a").write_bytes(b"half")
    with pytest.raises(UserError, match="no such file"):
        read_trace(tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "5,x"), 'tokens=5,x: expected token ids joined by commas, such as "5,9,23"'),
        (("--tokens", "5,99999"), "tokens: 99999 is outside of the model's vocabulary; expected ids below"),
        (("--model", "/no/such"), "base=/no/such: no such directory"),
        (("--base", "x/y"), "model: expected --model, or --base together with --speculator"),
        (("--out", "/no/such/file"), "out=/no/such/file: /no/such does not exist"),
        (("--out", "/"), "out=/: a directory, expected the name of a file"),
        (("--num-draft", 0), "num_draft=0: expected a number ≥ 1"),
        (
            ("--external-lib", "no.such"),
            "external-lib=no.such: cannot be imported: ModuleNotFoundError: No module named",
        ),
        (("--external-lib", "/no/such.py"), "external-lib=/no/such.py: no such file; expected a Python file"),
    ],
)
def test_what_is_refused_before_anything_loads(base, tmp_path, monkeypatch, arguments, message):
    import verl_speculator.base_model.loading

    monkeypatch.setattr(
        verl_speculator.base_model.loading, "load_base", lambda *args, **settings: pytest.fail("loaded")
    )
    assert_refused("trace", "--model", base, "--tokens", "5,9", "--out", tmp_path / "x", *arguments, message=message)


def test_console_with_square_brackets_in_a_table_prints_them(capsys):
    from rich.table import Table

    from verl_speculator.cli.diagnose import _console

    table = Table("note")
    table.add_row("could not run: list[int] [bold] :x:")
    _console().print(table)
    assert "could not run: list[int] [bold] :x:" in capsys.readouterr().out
