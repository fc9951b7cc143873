"""The plots of an evaluation, from made-up tables."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgba

from helpers.result_tables import CHAT, DEPTHS, LSTM, MATHS, MEASURED, RNN, TASKS, WHO, by_category, line, write
from verl_speculator.evaluation.plot_data import EXPECTED, read_tables
from verl_speculator.evaluation.plots import (
    STYLE,
    acceptance_per_depth,
    accepted_length_histogram,
    every_figure,
    plot,
    quality_per_depth,
    speedup_against_quality,
)
from verl_speculator.utils.settings import UserError

ALWAYS = {"acceptance_per_depth", "accepted_length_histogram", "speedup_against_quality", "quality_per_depth"}
BY_CATEGORY = {f"categories_{metric}" for metric in MEASURED}


def names(paths: Iterable[Path]) -> set[str]:
    return {path.stem for path in paths}


def required_columns() -> dict:
    """A row of the required columns: one plot, soon drawn."""
    return {name: line(RNN)[name] for name in EXPECTED}


def figures(directory: Path) -> dict:
    """The figures themselves, by name, undrawn."""
    with matplotlib.rc_context(STYLE):
        return dict(every_figure(*read_tables(directory)))


def one_figure(of: Callable, directory: Path):
    with matplotlib.rc_context(STYLE):
        return of(read_tables(directory)[0])


def titles(figure) -> list[str]:
    return [axis.get_title() or axis.get_title(loc="left") for axis in figure.axes]


def colours(figure) -> dict[str, tuple]:
    """Label → colour in a figure's legend."""
    (legend,) = figure.legends
    faces = [getattr(h, "get_facecolor", getattr(h, "get_color", None))() for h in legend.legend_handles]
    return {text.get_text(): to_rgba(face) for text, face in zip(legend.get_texts(), faces, strict=True)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict:
    """Two prompts files, the base alone and four speculators, thirteen categories in one of the files."""
    directory = tmp_path_factory.mktemp("drawn")
    write(directory / "results.csv", [line(who, prompts) for prompts in (CHAT, MATHS) for who in ("none", *WHO)])
    write(directory / "categories.csv", by_category() + by_category(prompts=MATHS, tasks=["grade_school"]))
    return figures(directory)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    """A smaller one, for the files themselves: one plot of categories is enough, and two speculators."""
    directory = tmp_path_factory.mktemp("evaluation")
    write(directory / "results.csv", [line(who) for who in ("none", RNN, "prompt_lookup")])
    write(
        directory / "categories.csv", by_category([RNN, "prompt_lookup"], tasks=TASKS[:2], accept_rate="", speedup="")
    )
    return directory


@pytest.fixture(scope="module")
def process(evaluation) -> subprocess.CompletedProcess:
    """A process that plots the evaluation and checks what importing and plotting leave behind."""
    code = (
        "import sys; from pathlib import Path; from verl_speculator.evaluation.plots import plot\n"
        "assert not {'matplotlib', 'pandas', 'numpy', 'torch'} & set(sys.modules)\n"
        "import matplotlib; from verl_speculator.evaluation.plots import STYLE\n"
        "old = {name: matplotlib.rcParams[name] for name in STYLE}\n"
        "written = plot(Path(sys.argv[1]))\n"
        "assert old == {name: matplotlib.rcParams[name] for name in STYLE} and 'matplotlib.pyplot' not in sys.modules\n"
        "assert sorted(written) == sorted(Path(sys.argv[1], 'plots').iterdir()), 'other files than it says'\n"
    )
    return subprocess.run([sys.executable, "-W", "error", "-c", code, evaluation], capture_output=True, text=True)


def test_plot_imports_lazily_and_leaves_matplotlib_unchanged(process):
    """No library before it is needed, and no trace in pyplot or in the caller's settings."""
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


def test_every_figure_full_tables_gives_all_plots(drawn):
    assert set(drawn) == ALWAYS | BY_CATEGORY


def test_plot_writes_png_and_pdf(evaluation, process):
    written = list((evaluation / "plots").iterdir())
    expected = ALWAYS | {"categories_tau"}
    assert {path.name for path in written} == {f"{name}.{kind}" for name in expected for kind in ("png", "pdf")}
    assert {path.name for path in evaluation.iterdir()} == {"results.csv", "categories.csv", "plots"}
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
        assert len(content) > 8000
        if path.suffix == ".pdf":
            # Journals refuse Type 3 fonts.
            assert b"/FontFile2" in content and b"/Type3" not in content


def test_every_figure_speculator_has_one_colour(drawn):
    seen: dict[str, set] = {}
    for figure in drawn.values():
        for label, colour in colours(figure).items():
            if label not in ("base alone", "Pareto front"):
                seen.setdefault(label, set()).add(colour)
    assert set(seen) == {"sum_rnn: global_step_4000", "sum_lstm: global_step_4000", "random sum_rnn", "prompt lookup"}
    assert all(len(shades) == 1 for shades in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


def test_every_figure_has_a_panel_for_each_prompts_file(drawn):
    assert titles(drawn["acceptance_per_depth"]) == ["spec_bench", "gsm8k_test"]
    assert titles(drawn["categories_tau"]) == ["spec_bench"], "one category is no comparison"
    (axis,) = drawn["categories_tau"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(TASKS)
    # The untrained one would press the others together, prompt lookup has no quality.
    assert set(colours(drawn["quality_per_depth"])) == {"sum_rnn: global_step_4000", "sum_lstm: global_step_4000"}
    assert [a.get_ylabel()[:2] for a in drawn["quality_per_depth"].axes[:3]] == ["cr", "KL", "to"]
    lines = {"base alone", "prompt lookup", "Pareto front"}
    assert set(colours(drawn["speedup_against_quality"])) == set(colours(drawn["quality_per_depth"])) | lines


def test_figures_show_values_and_intervals_of_the_table(tmp_path):
    row = line(RNN)
    write(tmp_path / "results.csv", [row])
    (axis,) = one_figure(acceptance_per_depth, tmp_path).axes
    values = axis.lines[0].get_ydata()
    assert list(values) == [row[f"accept_depth_{k}"] for k in range(DEPTHS)]
    (bars,) = axis.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    for k, interval in enumerate(ends):
        assert interval == pytest.approx((row[f"accept_depth_{k}_lo"], row[f"accept_depth_{k}_hi"]))
    (axis,) = one_figure(accepted_length_histogram, tmp_path).axes
    assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(1)


def test_plot_same_table_gives_same_bytes(tmp_path):
    write(tmp_path / "results.csv", [required_columns()])
    written = plot(tmp_path)
    assert names(written) == {"speedup_against_quality"}
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plot(tmp_path)] == first


def test_plot_base_model_alone_writes_nothing(tmp_path):
    write(tmp_path / "results.csv", [line("none")])
    assert plot(tmp_path) == []
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("emptied", "gone"),
    [
        (r"accept_depth_.*", {"acceptance_per_depth"}),
        (r"hist_.*", {"accepted_length_histogram"}),
        (r"speedup.*", {"speedup_against_quality"}),
        (r"(ce|kl|top1)_depth_.*", {"quality_per_depth"}),
        (r".*_(lo|hi)", set()),
        (r"(temperature|top_p|top_k|draft_length|seed|n_predict|method|base|untrained)", set()),
    ],
)
def test_every_figure_empty_columns_skips_their_plot(tmp_path, emptied, gone):
    rows = [line(RNN), line("prompt_lookup")]
    for row in rows:
        for name in [name for name in row if re.fullmatch(emptied, name)]:
            row[name] = ""
    write(tmp_path / "results.csv", rows)
    assert set(figures(tmp_path)) == ALWAYS - gone


def test_every_figure_required_columns_suffice(tmp_path):
    write(tmp_path / "results.csv", [required_columns()])
    assert set(figures(tmp_path)) == {"speedup_against_quality"}


@pytest.mark.parametrize(
    ("emptied", "label"), [((), "KL"), (("kl",), "cross-entropy"), (("kl", "ce"), "acceptance rate")]
)
def test_speedup_against_quality_falls_back_to_available_metric(tmp_path, emptied, label):
    rows = [line(RNN), line(LSTM) | dict.fromkeys(emptied, ""), line("prompt_lookup"), line("random")]
    write(tmp_path / "results.csv", rows)
    figure = one_figure(speedup_against_quality, tmp_path)
    (axis,) = figure.axes
    assert axis.get_xlabel().startswith(label)
    assert ("random sum_rnn" in colours(figure)) == (label == "acceptance rate")
    points = [line for line in axis.lines if line.get_marker() not in ("None", "|", "_")]
    assert len(points) == (4 if label == "acceptance rate" else 2)


def test_speedup_against_quality_front_holds_undominated_points(tmp_path):
    points = {"a": (1.0, 1.5), "b": (2.0, 2.0), "c": (1.5, 1.2), "d": (3.0, 1.9)}
    rows = [line(f"/runs/{name}") | {"kl": x, "speedup": y} for name, (x, y) in points.items()]
    write(tmp_path / "results.csv", rows)
    (axis,) = one_figure(speedup_against_quality, tmp_path).axes
    (front,) = [stroke for stroke in axis.lines if stroke.get_label() == "Pareto front"]
    corners = {tuple(corner) for corner in front.get_xydata()}
    assert {name for name, point in points.items() if point in corners} == {"a", "b"}


def test_read_tables_varying_policy_divides_panels(tmp_path):
    rows = [line(who, p, temperature=t) for t in (0, 0.7) for p in (CHAT, MATHS) for who in WHO]
    rows += [line("none", p, temperature=t, seed=9, top_p=0.5) for t in (0, 0.7) for p in (CHAT, MATHS)]
    for row in rows:
        # Draft lengths that differ between speculators are no policy.
        row["draft_length"] = 7 if row["speculator"] == "prompt_lookup" else row["draft_length"]
    write(tmp_path / "results.csv", rows)
    expected = ["spec_bench, T = 0", "spec_bench, T = 0.7", "gsm8k_test, T = 0", "gsm8k_test, T = 0.7"]
    assert titles(one_figure(acceptance_per_depth, tmp_path)) == expected
    lengths = [line(RNN, draft_length=length) for length in (2, 3)]
    write(tmp_path / "results.csv", lengths)
    assert titles(one_figure(acceptance_per_depth, tmp_path)) == [
        "spec_bench, 2 draft tokens",
        "spec_bench, 3 draft tokens",
    ]


def test_quality_per_depth_several_policies_drawn_once(tmp_path):
    one = line(RNN)
    write(tmp_path / "results.csv", [one, one | {"temperature": 1.0}])
    assert titles(one_figure(quality_per_depth, tmp_path))[0] == ""
    assert len(one_figure(acceptance_per_depth, tmp_path).axes) == 2


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/a/sum_rnn/step_1", "/a/sum_lstm/step_1"], ["sum_rnn: step_1", "sum_lstm: step_1"]),
        (["/a/sum_rnn/x/step_1", "/a/sum_rnn/y/step_1"], ["sum_rnn: x/step_1", "sum_rnn: y/step_1"]),
        (["/a/sum_rnn_8b"], ["sum_rnn_8b"]),
        (["b/step_1", "/a/b/step_1/"], ["sum_rnn: b/step_1", "sum_rnn: a/b/step_1"]),
        ([f"/sum_rnn/{'long' * 20}/step_{i}" for i in (1, 2)], ["sum_rnn: step_1", "sum_rnn: step_2"]),
        (
            [f"/sum_rnn/{'long' * 20}_{i}" for i in (1, 2)],
            [f"sum_rnn: longlonglonglo…{('long' * 20)[-23:]}_{i}" for i in (1, 2)],
        ),
    ],
)
def test_read_tables_labels_are_short_and_unique(tmp_path, paths, labels):
    rows = [line(path) | {"method": "sum_lstm" if "lstm" in path else "sum_rnn"} for path in paths]
    write(tmp_path / "results.csv", rows)
    assert list(colours(one_figure(acceptance_per_depth, tmp_path))) == labels


def test_read_tables_random_speculators_are_labelled_by_shape(tmp_path):
    rows = [line("random", method="sum_rnn"), line("random", method="sum_lstm"), line("random", n_predict=5)]
    write(tmp_path / "results.csv", rows)
    seen = colours(one_figure(acceptance_per_depth, tmp_path))
    assert list(seen) == ["random sum_rnn, 3 depths", "random sum_lstm", "random sum_rnn, 5 depths"]
    assert len(set(seen.values())) == 3


@pytest.mark.parametrize(("count", "files"), [(1, [CHAT]), (4, [CHAT, MATHS]), (20, [CHAT])])
def test_add_legend_covers_no_panel(tmp_path, count, files):
    who = [
        f"/experiments/qwen2.5-7b-instruct-{'x' * (i % 7)}/sum_rnn/global_step_{1000 * i}" for i in range(1, count + 1)
    ]
    write(tmp_path / "results.csv", [line(one, prompts) for prompts in files for one in who])
    # The three plots of categories differ in what their axis is called only: one is enough.
    categories = by_category(who, tasks=["$a_1$ & b", "writing"], tau="", speedup="")
    write(tmp_path / "categories.csv", categories)
    with matplotlib.rc_context(STYLE):
        drawn = dict(every_figure(*read_tables(tmp_path)))
        assert set(drawn) == ALWAYS | {"categories_accept_rate"}
        for name, figure in drawn.items():
            figure.draw_without_rendering()
            (legend,) = figure.legends
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, name
            for axis in figure.axes:
                assert box.y1 <= axis.get_tightbbox().y0 + 1, name
                assert axis.bbox.height > 80 or name.startswith("categories"), f"{name}: squeezed"


def error_of(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        plot(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plot_without_table_refused(tmp_path):
    assert "no results.csv" in error_of(tmp_path) and str(tmp_path) in error_of(tmp_path)
    assert "no results.csv" in error_of(tmp_path / "nowhere")


def test_plot_invalid_table_refused(tmp_path):
    results, categories = tmp_path / "results.csv", tmp_path / "categories.csv"
    results.write_text("")
    assert f"{results}: not a table" in error_of(tmp_path)
    results.write_text("speculator,prompts,depth\nnone,a,1\n")
    assert f"{results}: no column base, method, temperature" in error_of(tmp_path)
    results.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert str(results) in error_of(tmp_path)
    write(results, [line(RNN)])
    results.write_text(results.read_text().splitlines()[0] + "\n")
    assert f"{results}: no rows" in error_of(tmp_path)
    write(results, [line(RNN, tau="high")])
    assert f"{results}: column tau holds 'high', expected a number" in error_of(tmp_path)
    write(results, [line(RNN)])
    write(categories, [line(RNN)])
    assert f"{categories}: no column category" in error_of(tmp_path)
    write(categories, by_category())
    categories.write_text(categories.read_text().splitlines()[0] + "\n")
    assert set(figures(tmp_path)) == ALWAYS, "a table of categories may be without rows"


def test_plot_unwritable_directory_refused(tmp_path):
    write(tmp_path / "results.csv", [required_columns()])
    (tmp_path / "plots").write_text("a file where the folder should be")
    assert str(tmp_path / "plots") in error_of(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "plots"}


def test_plot_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "results.csv", [required_columns()])
    (tmp_path / "plots").mkdir()
    old = tmp_path / "plots" / "speedup_against_quality.png"
    old.write_text("old")

    def half(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    assert error_of(tmp_path) == f"{old}: cannot be written: No space left on device"
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_text() == "old"
