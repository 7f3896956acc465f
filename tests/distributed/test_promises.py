"""What is promised over several ranks besides equality: traffic, the guarantee, methods, checkpoints."""

import dataclasses

import pytest
import torch

import gradsurg
from tests.distributed import jobs_promises, nets


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("guarantee", ["gradient", "update"])
def test_bytes_on_the_wire(ranks, guarantee, count):
    """(m + 1) P and m x m numbers, one collective a task and dtype; once more P where the update is projected.

    Of each, a rank sends (ranks - 1) / ranks: together no more than (m + 1) P while there are at most m + 2 ranks.
    """
    m = 3
    for step in ranks(count).run(jobs_promises.wire, guarantee):
        trunk, heads = step["numbers"]
        numbers = trunk + heads
        large = [(name, size) for name, size in step["record"] if size > 4 * 250]
        scattered = [size for name, size in large if name == "reduce_scatter"]
        gathered = [size for name, size in large if name == "all_gather"]
        padding = 4 * count * 20  # every parameter is filled up to a multiple of the ranks
        assert len(scattered) == m
        assert sum(scattered) <= 4 * (m * trunk + heads) + m * padding
        assert len(gathered) == (2 if step["corrected"] else 1)
        assert sum(gathered) <= len(gathered) * (4 * numbers + padding)
        assert sum(size for _, size in large) <= 4 * (m + 1) * numbers + 4 * numbers * step["corrected"] + 5 * padding
        assert [name for name, _ in large if name == "all_reduce"] == []
        flags = (m + 1) * 14 + 2 * m + count  # of every parameter by task and beside them, of losses, of ranks
        small = sum(size for name, size in step["record"] if (name, size) not in large)
        assert small <= 8 * (2 * m * m + 6 * m + 20) + 8 * flags + count * 3 * 8
        assert nets.sent(large, count) <= 4 * (m + 1) * numbers
        assert step["corrected"] == (guarantee == "update"), "the case that this test is for did not come up"


def test_rows_travel_while_the_next_task_runs(ranks):
    for events in ranks(2).run(jobs_promises.flight):
        assert events == ["task0", "send", "task1", "send", "task2", "send", "wait", "wait", "wait"]


@pytest.mark.parametrize(("kind", "count"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
@pytest.mark.parametrize("surgery", ["cone", "sum"])
def test_the_update_hurts_no_task_of_the_whole_batch(ranks, surgery, kind, count):
    assert min(ranks(count).run(jobs_promises.movement, surgery, kind)) >= -1e-4


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_optimizers_share_their_rows(ranks, kind):
    results = ranks(2).run(jobs_promises.two_optimizers, kind)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_promises.two_optimizers_alone())


@pytest.mark.parametrize(("kind", "count"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
@pytest.mark.parametrize("options", [{"surgery": "pcgrad", "guarantee": "gradient"}, {}], ids=str)
def test_reports_and_state_dicts_are_those_of_all_ranks(ranks, options, kind, count):
    (_, report, state), *others = ranks(count).run(jobs_promises.method, options, kind)
    assert report.movement is not None or options
    for _, other, its in others:
        assert_same(dataclasses.asdict(other), dataclasses.asdict(report))
        assert_same(its, state)


def assert_same(ours, theirs):
    """Compare nested containers, to the bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs or ours != ours


# GradDrop draws a number for each number of the gradient, and every owner draws for its own; Krum of three tasks takes
# one of the two that are nearest to each other, whose scores are equal but for rounding.
ALIKE = ["graddrop", "krum"]
METHODS = [
    *({"surgery": each.name} for each in gradsurg.methods() if each.kind == "surgery" and each.name not in ALIKE),
    *({"normalize": each.name} for each in gradsurg.methods() if each.kind == "normalizer"),
    {"granularity": "tensor"},
    {"granularity": "group"},
    {"primary": "task1", "auxiliary": "help"},
    {"preferences": {"task0": 2.0}},
    {"nonfinite": "raise"},
]
NEED_MORE = {"prior_loss"}  # needs priors


@pytest.mark.parametrize("options", [each for each in METHODS if each.get("normalize") not in NEED_MORE], ids=str)
def test_every_method_does_what_it_does_alone(ranks, options):
    """Random ones draw from (seed, step), which are the same on every rank."""
    options = {"guarantee": "none", **options}
    results = ranks(2).run(jobs_promises.method, options)
    nets.equal_everywhere([state for state, _, _ in results])
    alone, report = jobs_promises.method_alone(options)
    nets.assert_close(results[0][0], alone, 2e-5)
    assert all(
        torch.equal(other.weights, results[0][1].weights) or other.weights.isnan().all() for _, other, _ in results
    )
    assert results[0][1].tasks == report.tasks


@pytest.mark.parametrize("surgery", ALIKE)
def test_all_ranks_do_the_same(ranks, surgery):
    results = ranks(2).run(jobs_promises.method, {"surgery": surgery, "guarantee": "gradient"})
    nets.equal_everywhere([state for state, _, _ in results])
    assert torch.equal(results[0][1].gramian, results[1][1].gramian)


MEMORY = {"surgery": "pcgrad", "normalize": "generalized_mean"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddp", MEMORY),
        ("fsdp2", MEMORY),
        ("ddp", {"rotate": 1}),
        ("ddp", {"refresh_every": 2}),
        ("fsdp2", {"refresh_every": 2}),
    ],
    ids=str,
)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_four(ranks, kind, options, tmp_path):
    folder = str(tmp_path)
    ranks(2).run(jobs_promises.checkpointed, kind, folder, 0, 3, options)
    uninterrupted = uninterrupted_alone(options)
    for count in (1, 2, 4):
        results = ranks(count).run(jobs_promises.checkpointed, kind, folder, 3, 6, options)
        nets.equal_everywhere([state for state, _ in results])
        nets.assert_close(results[0][0], uninterrupted, 1e-5)
        assert all(entry == results[0][1] for _, entry in results)
        assert results[0][1]["step"] == 6


def uninterrupted_alone(options):
    model = nets.build(nets.Shared)
    optimizer = nets.optimizer_of(model, **options)
    for step in range(6):
        optimizer.zero_grad()
        optimizer.total(model(*nets.batch(step))).backward()
        optimizer.step()
    return nets.state_of(model)


def test_functions_instead_of_losses(ranks):
    results = ranks(2).run(jobs_promises.functions)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], nets.alone(3))


def test_a_torch_that_cannot_cancel(ranks):
    results = ranks(2).run(jobs_promises.without_reset)
    nets.equal_everywhere(results)
    named = ranks(2).run(jobs_promises.functions)
    nets.assert_close(results[0], named[0])
