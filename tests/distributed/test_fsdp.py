"""FSDP2, tensor parallel and both: what one process does that sees the whole batch, and nothing gathered."""

import pytest
import torch

from tests.distributed import jobs_sharded, nets

KINDS = ["layers", "root only", "keeps parameters"]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["total", "backward", "task"])
def test_fsdp2_trains_as_one_process(ranks, count, kind, form):
    results = ranks(count).run(jobs_sharded.fsdp, kind, form, {})
    nets.equal_everywhere([state for state, _ in results])
    alone, report = jobs_sharded.alone(kind, form, {})
    nets.assert_close(results[0][0], alone)
    for _, other in results:
        assert torch.equal(other.gramian, results[0][1].gramian)
        assert torch.allclose(other.gramian, report.gramian, rtol=1e-4, atol=1e-6)


def test_fsdp2_with_a_compiled_trunk(ranks):
    """A shard may be zero on one rank; whether a task reaches a parameter is for all to say."""
    results = ranks(2).run(jobs_sharded.fsdp_compiled)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_sharded.fsdp_compiled_alone())


@pytest.mark.parametrize("reshards", [True, False])
@pytest.mark.parametrize("how", ["compiled first", "sharded first", "torch.compile"])
def test_fsdp2_with_compiled_blocks(ranks, how, reshards):
    """FSDP2 frees the memory of gathered parameters, which a compiled graph keeps as saved tensors."""
    results = ranks(2).run(jobs_sharded.fsdp_compiled_blocks, how, reshards)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_sharded.fsdp_compiled_blocks_alone())


def test_copies_of_shards_count_once(ranks):
    results = ranks(4).run(jobs_sharded.fsdp, "replicas of shards", "total", {})
    nets.equal_everywhere([state for state, _ in results])
    nets.assert_close(results[0][0], jobs_sharded.alone("layers", "total", {})[0])


def test_mixed_precision_policy(ranks):
    assert max(ranks(2).run(jobs_sharded.bfloat16_rows)) < 1e-6


@pytest.mark.parametrize("how", ["accumulate", "switched off", "neither"])
def test_accumulation(ranks, how):
    results = ranks(2).run(jobs_sharded.accumulated, how)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_sharded.accumulated_alone(how))


def test_total_inside_the_roots_forward_is_refused(ranks):
    for message in ranks(2).run(jobs_sharded.total_inside_forward):
        assert "Call total() on what forward() returned" in message


@pytest.mark.parametrize("lacks", [["task1"], ["task0", "task1", "task2"]], ids=len)
def test_different_tasks_are_refused_on_all_ranks(ranks, lacks):
    rest = [name for name in ("task0", "task1", "task2") if name not in lacks]
    for message in ranks(2).run(jobs_sharded.different_tasks, lacks):
        assert f"rank 0 ['task0', 'task1', 'task2']; rank 1 {rest}" in message


def test_parameters_that_nobody_averages_are_refused(ranks):
    for message in ranks(2).run(jobs_sharded.not_all_sharded):
        assert "nobody averages" in message


def test_no_gradient_is_gathered(ranks):
    """Over m plain steps we send the ranks' inner products and nothing else."""
    m, ours, plain = 3, ranks(2).run(jobs_sharded.session, True)[0], ranks(2).run(jobs_sharded.session, False)[0]
    scattered = sum(size for name, size in ours if name == "reduce_scatter")
    assert 0 < scattered <= m * sum(size for name, size in plain if name == "reduce_scatter") + 1
    # Parameters are gathered for the backward pass of every task, as plain FSDP2 does for its one.
    gathered = sum(size for name, size in ours if name == "all_gather" and size > 64)
    assert gathered <= m * sum(size for name, size in plain if name == "all_gather")
    small = [size for name, size in ours if name == "all_reduce"]
    assert sum(small) <= 8 * (m * m + m + 4 * (m + 1))


@pytest.mark.parametrize(
    "kind", ["tensor", "tensor, its losses DTensors", "sequence", "fsdp x tensor", "fsdp x sequence"]
)
def test_tensor_parallel_counts_each_element_once(ranks, kind):
    results = ranks(4 if "fsdp" in kind else 2).run(jobs_sharded.parallel, kind, {})
    nets.equal_everywhere([state for state, _ in results])
    alone, report = jobs_sharded.parallel_alone({})
    nets.assert_close(results[0][0], alone)
    assert torch.allclose(results[0][1].gramian, report.gramian, rtol=1e-4, atol=1e-6)
