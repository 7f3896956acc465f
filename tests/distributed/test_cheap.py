"""features=, refresh_every= and rotate= over ranks: what one process does that sees the whole batch."""

import pytest
import torch

from tests.distributed import jobs_cheap, nets

FORMS = ["total", "backward", "plain", "added", "micro-batches", "accumulate", "scaled"]


def compare(results, alone, tolerance=1e-6):
    nets.equal_everywhere([state for state, *_ in results])
    state, levels, (losses, weights) = alone
    nets.assert_close(results[0][0], state, tolerance)
    for _, others, (means, ours), _ in results:
        assert others == levels
        assert means == pytest.approx(losses, rel=1e-5)
        assert torch.allclose(ours, weights, rtol=1e-4, equal_nan=True)
        assert torch.equal(ours, results[0][2][1])


CASES = [*((kind, "total") for kind in jobs_cheap.KINDS[1:]), *(("ddp", form) for form in FORMS), ("fsdp2", "backward")]


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_refresh_every(ranks, kind, form):
    options = {"refresh_every": 3}
    results = ranks(4 if form == "backward" else 2).run(jobs_cheap.cheap, kind, form, options)
    alone = jobs_cheap.cheap_alone(form, options)
    assert alone[1].count("reused weights") == 3
    compare(results, alone)


def test_a_rank_that_lacks_a_task_makes_all_find_new_weights(ranks):
    results = ranks(2).run(jobs_cheap.lacking, {"refresh_every": 3})
    nets.equal_everywhere([state for state, _, _ in results])
    for _, levels, memory in results:
        assert levels == ["gradients", "reused weights", "gradients", "reused weights", "reused weights"]
        assert memory == results[0][2]


def test_a_rank_that_raises_in_a_reused_step(ranks):
    results = ranks(2).run(jobs_cheap.failing, {"refresh_every": 3}, False)
    assert results[1][0] == ["no gradient here"]
    (message,) = results[0][0]
    assert "rank 1 raised in the backward passes" in message
    nets.equal_everywhere([state for _, state in results])


ROTATIONS = [
    *(("total", {"rotate": k}) for k in (1, 2)),
    *((form, {"rotate": 1}) for form in FORMS[1:]),
    ("total", {"rotate": 1, "guarantee": "gradient", "surgery": "pcgrad"}),
    ("total", {"rotate": 2, "row_dtype": torch.float16}),
    ("total", {"rotate": 1, "nonfinite": "skip_task"}),
]


@pytest.mark.parametrize(("form", "options"), ROTATIONS, ids=str)
def test_rotate(ranks, form, options):
    results = ranks(4 if form == "backward" else 2).run(jobs_cheap.cheap, "ddp", form, options)
    alone = jobs_cheap.cheap_alone(form, options)
    assert alone[1][1:] == ["moving averages"] * (jobs_cheap.STEPS - 1)
    compare(results, alone, 1e-6 if "row_dtype" not in options else 1e-3)


def test_turns_are_those_of_all_ranks(ranks):
    """A task that some rank lacks is due all the same, and the averages stay everybody's."""
    results = ranks(2).run(jobs_cheap.lacking, {"rotate": 1})
    nets.equal_everywhere([state for state, _, _ in results])
    (first, second) = (memory for _, _, memory in results)
    assert first["rotate"] == second["rotate"]
    nets.equal_everywhere(list(map(averages_of, (first, second))))


def averages_of(memory):
    return {f"{name} {k}": t for name, row in memory["rows"].items() for k, t in enumerate(row) if t is not None}


FEATURES = [
    *(("ddp", form, {}) for form in FORMS),
    ("find unused", "total", {}),
    ("static", "total", {"surgery": "upgrad"}),
    ("ddp", "total", {"normalize": "loss"}),
    ("ddp", "total", {"nonfinite": "raise"}),
]


@pytest.mark.parametrize(("kind", "form", "options"), FEATURES, ids=str)
def test_features(ranks, kind, form, options):
    results = ranks(4 if form == "backward" else 2).run(jobs_cheap.cheap, kind, form, options, True)
    alone = jobs_cheap.cheap_alone(form, options, True)
    assert alone[1] == ["features"] * jobs_cheap.STEPS
    compare(results, alone)


def test_a_rank_that_raises_in_a_head(ranks):
    results = ranks(2).run(jobs_cheap.failing, {}, True)
    assert results[1][0] == ["no gradient here"]
    (message,) = results[0][0]
    assert "or raised" in message
    nets.equal_everywhere([state for _, state in results])


@pytest.mark.parametrize("options", [{"refresh_every": 3}, {"rotate": 1}, {}], ids=str)
def test_bytes_on_the_wire(ranks, options):
    """What plain DDP sends, and small numbers; rotate=1 sends it of one task."""
    for record, level, trunk, heads in ranks(2).run(jobs_cheap.wire, options):
        assert level == {"refresh_every": "reused weights", "rotate": "moving averages"}.get(
            *options or [""], "features"
        )
        large = [(name, size) for name, size in record if size > 4 * 250]
        assert large == [("all_reduce", 4 * (trunk + heads // 3 if "rotate" in options else trunk + heads))]
        assert sum(size for _, size in record) - sum(size for _, size in large) <= 8 * 150
