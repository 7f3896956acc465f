"""The main job: its options, its table and picture, and what it shows, on little data."""

import sys

import pytest
import torch

from gradsurg import __version__
from gradsurg.__main__ import _parser, main
from gradsurg.demo.digits import BATCH, OPTIMIZERS, TASKS, Data, Job, compare, conflicts, train
from gradsurg.demo.table import plot, table
from gradsurg.normalize import NORMALIZERS, Norm
from gradsurg.surgery import SURGERIES


@pytest.fixture(scope="module")
def data():
    return Data.digits(train=1024, test=512)


@pytest.fixture(scope="module")
def runs(data):
    return compare(Job(epochs=6), data, [0, 1], bar=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "middle"], "left"),
        (["--tasks", "left", "left"], "twice"),
        (["--surgery", "conee"], "upgrad"),
        (["--normalize", "loud"], "norm"),
        (["--optimizer", "Adam"], "adam"),
        (["--guarantee", "always"], "update"),
        (["--epochs", "0"], "whole number from 1"),
        (["--epochs", "many"], "whole number from 1"),
        (["--seed", "-1"], "whole number from 0"),
        (["--runs", "1.5"], "whole number from 1"),
        (["--output", "picture.jpg"], ".png"),
        (["--output", "no/such/folder/picture.png"], "no folder"),
        (["--colour", "red"], "--colour"),
    ],
    ids=" ".join,
)
def test_a_bad_value_is_a_usage_error(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2
    assert printed.startswith("usage: python -m gradsurg")
    assert arguments[0] in printed
    assert said in printed


def test_options_that_the_library_refuses_are_usage_errors_too(monkeypatch, capsys):
    class Picky(Norm):
        def __init__(self):
            raise ValueError("picky needs a value for each task")

    monkeypatch.setitem(NORMALIZERS, "picky", Picky)
    with pytest.raises(SystemExit) as exit_:
        main(["--normalize", "picky"])
    assert exit_.value.code == 2
    assert "picky needs a value for each task" in capsys.readouterr().err


def test_version_names_both_versions(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"gradsurg {__version__}, torch {torch.__version__}\n"


def test_help_names_every_option_and_choice(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in (
        "--tasks",
        "--surgery",
        "--optimizer",
        "--seed",
        "--epochs",
        *TASKS,
        *OPTIMIZERS,
        "cone",
        "mgda",
    ):
        assert word in printed


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit_:
        main([])
    printed = capsys.readouterr().err
    assert exit_.value.code == 1
    assert 'pip install "gradsurg[demo]"' in printed
    assert {"sklearn": "scikit-learn"}.get(module, module) in printed


def test_the_command_prints_the_table_and_writes_the_picture(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Data, "digits", lambda *_: data)
    picture = tmp_path / "picture.png"
    assert main(["--epochs", "1", "--runs", "1", "--seed", "7", "--output", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n|") == 2 + len(TASKS) + 4
    assert "gradsurg: 0 of 8 updates raised some task's loss" in out
    assert "seeds 7; 1 epochs" in out
    assert "16/16" in err  # the progress bar: 8 steps of each
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_normaliser_that_needs_the_tasks_priors_gets_them(data, monkeypatch, tmp_path):
    monkeypatch.setattr(Data, "digits", lambda *_: data)
    short = ["--epochs", "1", "--runs", "1", "--tasks", "left", "pixels"]
    assert main([*short, "--normalize", "prior_loss", "--output", str(tmp_path / "picture.png")]) == 0


def test_no_update_of_gradsurg_conflicts_and_most_of_plain_adam_do(runs):
    ours, plain = (
        torch.cat([conflicts(run.update) for run in runs[name]]).double().mean() for name in ("gradsurg", "plain sum")
    )
    assert ours <= 1e-3
    assert plain > 0.5


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw", "rmsprop", "adagrad", "nadam"])
def test_the_update_is_held_under_schedule_and_clipping(optimizer):
    """192 steps of the whole job; the same as benchmarks/conflicts.py, in short."""
    data = Data.digits(test=128)
    job = Job(
        optimizer=optimizer, epochs=4, clip=1.0, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 192)
    )
    run = train(job, data, wrapped=True)
    assert len(run.update) == 192
    assert conflicts(run.update).double().mean() <= 1e-3


def test_no_gradient_of_gradsurg_conflicts(runs):
    assert not any(conflicts(run.gradient).any() for run in runs["gradsurg"])


def test_both_learn(runs):
    for run in (*runs["plain sum"], *runs["gradsurg"]):
        assert (run.losses[-1] < 0.7 * run.losses[0]).all()


def test_the_table_has_a_row_a_task_and_four_more(runs):
    lines = table(runs).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "plain sum", "gradsurg"]
    titles = [row[0] for row in cells[2:]]
    assert titles[: len(TASKS)] == list(TASKS.values())
    assert [title.split()[0] for title in titles[len(TASKS) :]] == [
        "conflicts",
        "conflicts",
        "worst",
        "seconds",
    ]
    assert cells[2 + len(TASKS) + 1][2] == "0.0 ± 0.0"


def test_the_picture_is_small_enough_to_commit(runs, tmp_path):
    picture = tmp_path / "picture.png"
    plot(runs, picture, "a title")
    assert 10_000 < picture.stat().st_size < 200_000


@pytest.mark.parametrize("tasks", [("left",), ("right", "pixels")], ids=" ".join)
def test_some_of_the_tasks(tasks, data, tmp_path):
    runs = compare(Job(tasks=tasks, epochs=1), data, [0], bar=False)
    assert runs["gradsurg"][0].update.shape == (8, len(tasks))
    assert len(table(runs).splitlines()) == 2 + len(tasks) + 4
    plot(runs, tmp_path / "picture.png", "a title")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sum_without_guarantee_is_the_plain_run(optimizer, data):
    """The two arms differ in nothing but the surgery: same parameters, same batches, same measuring.

    Not to the bit: rows are summed after one backward pass a task, the plain sum inside of one.
    """
    job = Job(optimizer=optimizer, epochs=1, options={"surgery": "sum", "normalize": "none", "guarantee": "none"})
    plain, wrapped = (train(job, data, wrapped=wrapped) for wrapped in (False, True))
    torch.testing.assert_close(plain.losses, wrapped.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(plain.gradient, wrapped.gradient, rtol=0, atol=1e-3)
    torch.testing.assert_close(plain.update, wrapped.update, rtol=0, atol=1e-3)


def test_one_task_is_the_plain_run_to_the_bit(data):
    plain, wrapped = (train(Job(tasks=("left",), epochs=1), data, wrapped=wrapped) for wrapped in (False, True))
    assert torch.equal(plain.losses, wrapped.losses)


def test_same_seed_same_run_and_global_random_state_untouched(data):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (train(Job(epochs=1), data, wrapped=True) for _ in range(2))
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(before, torch.get_rng_state())


def test_no_image_is_in_both_parts_and_the_pairs_overlap(data):
    from sklearn.datasets import load_digits

    assert data.train.images.shape == (1024, 110)
    assert len(data.test.images) == 512
    assert data.train.images.min() >= 0
    assert data.train.images.max() <= 1
    # The three columns and two rows that only the left digit reaches tell which image it is.
    digits = torch.from_numpy(load_digits().images).float() / 16
    corners = torch.unique(torch.cat([digits[:, :2].flatten(1), digits[:, 2:, :3].flatten(1)], 1), dim=0)
    assert len(corners) > 1700  # nearly every digit is known by that corner alone

    def seen(pairs):
        canvas = pairs.images.view(-1, 10, 11)
        corner = torch.cat([canvas[:, :2, :8].flatten(1), canvas[:, 2:8, :3].flatten(1)], 1)
        return {tuple(row) for row in corner.tolist()}

    assert not seen(data.train) & seen(data.test)


@pytest.mark.parametrize("name", SURGERIES)
def test_every_surgery_can_be_asked_for_and_trains(name):
    options = _parser().parse_args(["--surgery", name])
    run = train(Job(epochs=1, options={"surgery": options.surgery}), Data.digits(BATCH, BATCH), wrapped=True)
    assert run.update.shape == (1, len(TASKS))
    assert run.update.min() >= -1e-4
