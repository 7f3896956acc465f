"""Files of a history hold what was recorded, whatever the names and numbers."""

import json
import math

import pytest
import torch

import gradsurg
from gradsurg.monitor import files
from gradsurg.monitor.files import from_json, to_json
from tests.monitor.recorded_runs import as_values, attached, do, table
from tests.networks import same


def test_jsonl_is_exact_and_is_json(tmp_path):
    model, optimizer, history = attached(granularity="tensor")
    do(model, optimizer, 0, 1)
    history.save(tmp_path / "h.jsonl")
    loaded = gradsurg.History.load(tmp_path / "h.jsonl")
    for a, b in zip(history.reports, loaded.reports, strict=True):
        assert same(as_values(a), as_values(b))
        assert a.blocks == b.blocks
        assert a.change == b.change
    for line in (tmp_path / "h.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda _: pytest.fail("NaN is not JSON"))


def test_nan_survives_as_nan(tmp_path):
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([a, b], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    optimizer.total({"a": a.sum(), "b": b.sum()}).backward()  # nothing shared: nothing measured
    optimizer.step()
    history.save(tmp_path / "h.jsonl")
    (report,) = gradsurg.History.load(tmp_path / "h.jsonl").reports
    assert report.norms.isnan().all()
    assert math.isnan(report.change)
    assert report.gramians is None
    assert float(report.losses["a"]) == 2.0


def test_the_csv_shows_every_step_and_task(tmp_path):
    model, optimizer, history = attached()
    do(model, optimizer, 0, 1, 2)
    history.save(tmp_path / "h.csv")
    rows = table(tmp_path / "h.csv")
    assert len(rows) == 9
    for k, report in enumerate(history.reports):
        for row, (i, name) in zip(rows[3 * k : 3 * k + 3], enumerate(report.tasks), strict=True):
            assert (row["step"], row["task"]) == (str(report.step), name)
            assert float(row["loss"]) == float(report.losses[name])
            for title, column in (
                ("norm", report.norms),
                ("weight", report.weights[0]),
                ("scale", report.scales[0]),
                ("cos_direction", report.direction_cosines),
                ("cos_update", report.update_cosines),
            ):
                assert float(row[title]) == float(column[i]), title
            assert [float(row[f"cos:{other}"]) for other in report.tasks] == report.cosines[i].tolist()
            assert (row["corrected"], row["held"]) == (str(int(report.movement.corrected)), "0")


def test_names_may_be_anything(tmp_path):
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    names = ('a,"b"', "c\nd", "ü:/|")
    optimizer.backward({name: (w * k).square().sum() for k, name in enumerate(names, 1)})
    optimizer.step()
    history.save(tmp_path / "h.jsonl")
    (report,) = gradsurg.History.load(tmp_path / "h.jsonl").reports
    assert report.tasks == names
    history.save(tmp_path / "h.csv")
    assert [row["task"] for row in table(tmp_path / "h.csv")] == list(names)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_spreadsheet_runs_no_name_as_a_formula(tmp_path, first):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), nonfinite="skip_task")
    history = gradsurg.History(optimizer, every=1)
    name, skipped = f'{first}HYPERLINK("http://x","click")', f"{first}1"
    optimizer.backward({name: w.sum(), "a=b": w.square().sum(), skipped: w.sum() * math.nan})
    optimizer.step()
    history.save(tmp_path / "h.csv")
    assert [row["task"] for row in table(tmp_path / "h.csv")] == ["'" + name, "a=b", "'" + skipped]
    assert not any(title.startswith(first) for title in table(tmp_path / "h.csv")[0])
    # The file that is read again keeps the names as they are.
    history.save(tmp_path / "h.jsonl")
    (report,) = gradsurg.History.load(tmp_path / "h.jsonl").reports
    assert report.tasks == (name, "a=b")


def test_skipped_tasks_are_named(tmp_path):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), nonfinite="skip_task")
    history = gradsurg.History(optimizer, every=1)
    optimizer.backward({"a": w.sum(), "b": w[0] ** 2, "bad": (w * math.inf).sum()})
    optimizer.step()
    history.save(tmp_path / "h.jsonl")
    (report,) = gradsurg.History.load(tmp_path / "h.jsonl").reports
    assert report.nonfinite == ("bad",)
    assert report.tasks == ("a", "b")
    history.save(tmp_path / "h.csv")
    assert [(row["task"], row["finite"]) for row in table(tmp_path / "h.csv")] == [("a", "1"), ("b", "1"), ("bad", "0")]


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl or a \.csv"):
        gradsurg.History().save(tmp_path / "h.txt")
    path = tmp_path / "h.jsonl"
    path.write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"line 1: no report: missing .*'tasks'"):
        gradsurg.History.load(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        gradsurg.History.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        gradsurg.History.load(path)
    with pytest.raises(ValueError, match=r"loaded from a \.jsonl"):
        gradsurg.History.load(tmp_path / "h.csv")


def test_json_of_a_later_version_still_reads():
    model, optimizer, history = attached()
    do(model, optimizer, 0)
    (report,) = history.reports
    assert same(as_values(from_json({**to_json(report), "something new": [1]})), as_values(report))


def a_history(names=("a", "b")):
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    for _ in range(3):
        first, second = names
        optimizer.backward({first: w[0] ** 2, second: (w[0] - w[1] - 3) ** 2})
        optimizer.step()
    return history


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, ending):
    path, history = tmp_path / f"run.{ending}", a_history()
    history.save(path)
    before = path.read_bytes()
    real = files._plain if ending == "jsonl" else files._rows
    calls = []

    def fails(value):
        calls.append(value)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return real(value)

    monkeypatch.setattr(files, real.__name__, fails)
    with pytest.raises(OSError, match="no space"):
        history.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_through_a_link_replaces_what_it_points_to(tmp_path):
    path, link = tmp_path / "run.jsonl", tmp_path / "link.jsonl"
    path.write_text("old")
    link.symlink_to(path)
    a_history().save(link)
    assert link.is_symlink()
    assert len(gradsurg.History.load(path)) == 3


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("step", "x"),
        ("step", 1.5),
        ("step", None),
        ("tasks", "ab"),
        ("tasks", [1, 2]),
        ("tasks", ["a"]),
        ("losses", [1.0]),
        ("losses", {"a": "x"}),
        ("weights", {"a": 1}),
        ("weights", [[1.0], [2.0, 3.0]]),
        ("weights", None),
        ("stationary", 0),
        ("path", 3),
        ("movement", [1]),
        ("movement", {"inner": [1.0, 1.0]}),
        ("blocks", [None]),
    ],
)
def test_a_wrong_type_is_named_with_its_line(tmp_path, field, wrong):
    path = tmp_path / "run.jsonl"
    a_history().save(path)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), field: wrong})
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: "):
        gradsurg.History.load(path)


NAMES = ["\x00\x07", "\x85\u2028\u2029", "\ud800", '<b>&"', "\ufffe", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds_of_characters_come_back(tmp_path, name):
    history = a_history((name, "b"))
    history.save(tmp_path / "run.jsonl")
    history.save(tmp_path / "run.csv")
    assert gradsurg.History.load(tmp_path / "run.jsonl").reports[0].tasks == (name, "b")
