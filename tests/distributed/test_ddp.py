"""DDP: the ranks stay equal to the bit, and do what one process does that sees the whole batch."""

import pytest
import torch

from tests.distributed import jobs_ddp, nets

FLAGS = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("form", ["total", "backward", "task"])
@pytest.mark.parametrize("net", ["net", "shared"])
def test_ranks_train_as_one_process(ranks, count, form, net):
    results = ranks(count).run(jobs_ddp.steps, net, form, {}, {})
    nets.equal_everywhere([state for state, _ in results])
    alone, report = jobs_ddp.steps_alone(net, form, {})
    nets.assert_close(results[0][0], alone)
    for _, other in results:  # losses are means over ranks, the Gramian is that of the averaged gradients
        assert other.tasks == report.tasks
        assert torch.allclose(other.gramian, report.gramian, rtol=1e-5)
        assert other.losses.keys() == report.losses.keys()
        assert all(torch.allclose(other.losses[name], loss.double()) for name, loss in report.losses.items())


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("form", ["total", "backward"])
def test_every_flag_of_ddp(ranks, flags, form):
    results = ranks(2).run(jobs_ddp.steps, "net", form, flags, {"guarantee": "gradient"})
    nets.equal_everywhere([state for state, _ in results])
    nets.assert_close(results[0][0], jobs_ddp.steps_alone("net", form, {"guarantee": "gradient"})[0])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("form", ["total", "backward"])
def test_a_task_missing_on_some_ranks(ranks, count, form):
    results = ranks(count).run(jobs_ddp.uneven, form)
    nets.equal_everywhere([state for state, _, _ in results])
    nets.assert_close(results[0][0], jobs_ddp.uneven_alone(count))
    reports = [report for _, report, _ in results]
    assert all(report.tasks == reports[0].tasks for report in reports)
    assert all(report.losses == reports[0].losses for report in reports)
    assert all(report.gramian.equal(reports[0].gramian) for report in reports)
    assert all(memory == results[0][2] for _, _, memory in results)


@pytest.mark.parametrize(
    "options", [{"preferences": {"task2": 2.0}}, {"primary": "task0"}, {"margin": {"task1": 0.1}}], ids=str
)
def test_a_task_that_options_name_may_be_missing_on_a_rank(ranks, options):
    results = ranks(2).run(jobs_ddp.named_later, options)
    nets.equal_everywhere([state for state, _ in results])
    nets.assert_close(results[0][0], jobs_ddp.uneven_alone(2, 2, 4, **options))
    assert [warning for _, warning in results] == ["", ""]


def test_an_option_that_names_no_rank_s_task_is_warned_of_on_all(ranks):
    for state, warning in ranks(2).run(jobs_ddp.named_later, {"preferences": {"tusk0": 2.0}}):
        assert "preferences names the task 'tusk0'" in warning
        nets.assert_close(state, nets.state_of(nets.build()), 0)


@pytest.mark.parametrize("form", ["total", "backward"])
def test_ranks_without_any_task(ranks, form):
    results = ranks(2).run(jobs_ddp.without_any, form)
    for messages, _ in results:
        assert len(messages) == 3
        assert all("no rank has a task in this step" in message for message in messages)
    nets.equal_everywhere([state for _, state in results])
    nets.assert_close(results[0][1], jobs_ddp.without_any_alone(2))


@pytest.mark.parametrize("how", ["argument", "added", "added first", "built later", "outside", "mixed"])
def test_gradients_that_take_no_part_in_surgery_are_averaged(ranks, how):
    results = ranks(2).run(jobs_ddp.with_plain, how, {})
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_ddp.with_plain_alone(how))


@pytest.mark.parametrize("flags", FLAGS[1:], ids=str)
def test_plain_steps_between_ours(ranks, flags):
    results = ranks(2).run(jobs_ddp.with_plain, "mixed", flags)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_ddp.with_plain_alone("mixed"))


@pytest.mark.parametrize("plan", ["TPP", "TTPTPP"])
@pytest.mark.parametrize("flags", [*FLAGS[1:3], {"static_graph": True, "gradient_as_bucket_view": True}], ids=str)
def test_plain_steps_after_totals(ranks, flags, plan):
    """A static graph is counted in the first backward pass, which was a task's."""
    results = ranks(2).run(jobs_ddp.in_turns, plan, flags)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_ddp.in_turns_alone(plan))


def test_a_plain_step_that_reaches_less_than_the_total_before_it(ranks):
    results = ranks(2).run(jobs_ddp.in_turns, "TptpTp", {"find_unused_parameters": True})
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_ddp.in_turns_alone("TptpTp"))


def test_buffers_are_those_of_plain_ddp(ranks):
    for plain, ours in ranks(2).run(jobs_ddp.buffers):
        nets.assert_close(ours, plain)


@pytest.mark.parametrize("overflow", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, overflow):
    results = ranks(2).run(jobs_ddp.scaled, overflow)
    nets.equal_everywhere([state for state, _ in results])
    assert [scale for _, scale in results] == ([4.0, 4.0] if overflow else [8.0, 8.0])
    nets.assert_close(results[0][0], jobs_ddp.scaled_alone(overflow))


@pytest.mark.parametrize("options", [{}, {"rotate": 3}], ids=str)
def test_a_task_that_is_not_finite_where_others_lack_it(ranks, options):
    results = ranks(2).run(jobs_ddp.skipping, options)
    nets.equal_everywhere([state for state, _, _ in results])
    for state, tasks, skipped in results:
        assert set(tasks) == {"task0", "task1", "task2"}  # of the second micro-batch, which is finite
        assert skipped == ("task1",)
        assert all(t.isfinite().all() for t in state.values())


@pytest.mark.parametrize("kind", jobs_ddp.KINDS)
def test_checkpointed_compiled_and_complex_models(ranks, kind):
    results = ranks(2).run(jobs_ddp.special, kind)
    nets.equal_everywhere(results)
    nets.assert_close(results[0], jobs_ddp.special_alone(kind))
