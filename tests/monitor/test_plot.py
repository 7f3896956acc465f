"""Pictures: what is drawn is what was recorded, without a display, and told apart without hue."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import gradsurg
from gradsurg import plot
from gradsurg.monitor.plot.style import COLOURS, styles
from tests.networks import build, trained


def record(batches=30, drop=None, **options):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), **options)
    history = gradsurg.History(optimizer, every=1, model=model)
    for batch in range(batches):
        losses = model.losses(batch)
        if drop is not None and batch % 2:
            losses.pop(drop)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    return history


@pytest.fixture(scope="module")
def history():
    return record(granularity="tensor")


HISTORY_PLOTS = ["conflict_matrix", "conflicts", "angles", "weights", "norms", "layers", "losses"]


@pytest.mark.parametrize("name", HISTORY_PLOTS)
def test_each_returns_axes_of_its_own_or_yours(name, history, tmp_path):
    draw = getattr(plot, name)
    own = draw(history)
    assert isinstance(own, Axes)
    assert own.get_title()
    own.figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 3000
    yours = Figure().add_subplot()
    assert draw(history.reports, ax=yours) is yours


def curves(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_angles_are_those_of_the_reports(history):
    drawn = curves(plot.angles(history))
    assert list(drawn) == ["left", "right", "whole"]
    for k, line in enumerate(drawn.values()):
        expected = [math.degrees(math.acos(float(report.update_cosines[k]))) for report in history.reports]
        assert list(line.get_ydata()) == pytest.approx(expected)
        assert list(line.get_xdata()) == list(range(30))


@pytest.mark.parametrize(("name", "of"), [("weights", lambda r: r.weights.mean(0)), ("norms", lambda r: r.norms)])
def test_curves_are_those_of_the_reports(name, of, history):
    for k, line in enumerate(curves(getattr(plot, name)(history)).values()):
        assert list(line.get_ydata()) == pytest.approx([float(of(report)[k]) for report in history.reports])


def test_long_runs_are_averaged():
    reports = record(4).reports * 100
    steps = [gradsurg.Report(**{**vars(report), "step": k}) for k, report in enumerate(reports)]
    (line, *_) = curves(plot.norms(steps)).values()
    assert len(line.get_xdata()) == 100
    assert list(line.get_ydata()) == pytest.approx([float(torch.stack([r.norms[0] for r in reports[:4]]).mean())] * 100)


def test_a_task_that_is_absent_leaves_a_gap():
    drawn = curves(plot.norms(record(drop="right")))
    assert len(drawn["left"].get_xdata()) == 30
    assert list(drawn["right"].get_xdata()) == list(range(0, 30, 2))


def test_the_matrix_counts_steps(history):
    image = plot.conflict_matrix(history).get_images()[0].get_array()
    cosines = torch.stack([report.cosines for report in history.reports])
    assert float(image[0, 1]) == pytest.approx(100 * float((cosines[:, 0, 1] < 0).double().mean()))
    assert image.mask.diagonal().all()


def test_layers_count_steps_by_block(history):
    ax = plot.layers(history)
    image = ax.get_images()[0].get_array()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]
    cosines = torch.stack([report.block_cosines for report in history.reports])
    for row in range(4):
        assert float(image[row, 2]) == pytest.approx(100 * float((cosines[:, row, 1, 2] < 0).double().mean()))


def test_trajectory_marks_starts_ends_and_minima():
    losses = {"a": lambda p: (p[..., 0] - 1) ** 2 + p[..., 1] ** 2, "far": lambda p: (p[..., 0] - 50) ** 2}
    paths = {"one": torch.tensor([[0.0, 0.0], [2.0, 1.0]]), "two": torch.tensor([[0.0, 1.0], [1.5, -1.0]])}
    ax = plot.trajectory(losses, paths)
    assert {text.get_text() for text in ax.texts} == {"best for a"}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    with pytest.raises(ValueError, match=r"\(T, 2\)"):
        plot.trajectory(losses, {"one": torch.zeros(3)})


def test_tasks_differ_without_hue():
    """Neighbours differ by a tenth of the way from black to white; the first eight by dashes and markers too."""
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, COLOURS)]
    assert all(abs(one - other) > 0.1 for one, other in itertools.pairwise(grey))
    assert abs(grey[0] - grey[1]) > 0.4
    first = list(itertools.islice(styles(), 8))
    assert len({(str(style["linestyle"]), style["marker"]) for style in first}) == 8
    assert len({style["marker"] for style in first}) == 8


def test_what_cannot_be_drawn_is_said(history):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.angles([])
    for draw in (plot.weights, plot.losses):
        with pytest.raises(TypeError, match=r"of a Report: pass a gradsurg\.History"):
            draw(history.reports[0])
    with pytest.raises(ValueError, match="granularity='tensor'"):
        plot.layers(record(2))
    with pytest.raises(ValueError, match="guarantee='update'"):
        plot.angles(record(2, guarantee="none"))
    plot.angles(record(2, guarantee="none"), of="direction")
    with pytest.raises(ValueError, match="'update' or 'direction'"):
        plot.angles(history, of="gradient")
    with pytest.raises(ValueError, match="no loss was recorded"):
        plot.losses([gradsurg.Report(**{**vars(report), "losses": {}}) for report in history.reports])


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import torch, gradsurg, gradsurg.plot\n"
        "try: gradsurg.plot.trajectory({}, {'a': torch.zeros(2, 2)})\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'gradsurg.plot needs matplotlib: pip install "gradsurg[plot]"'
