"""Tables of pointers and items: what is cut where, and what is cached."""

import threading
import time
from collections import OrderedDict

import pytest
import torch

from gradsurg.linalg.kernels import table
from gradsurg.linalg.kernels.table import CHUNK_LEAST, CHUNK_MOST, CHUNK_TARGET_PROGRAMS, chunk_for, launches_for, plan
from gradsurg.linalg.kernels.usual import usual_of


@pytest.mark.parametrize(
    ("total", "chunk"),
    [
        (0, CHUNK_LEAST),
        (2 * CHUNK_LEAST * CHUNK_TARGET_PROGRAMS - 1, CHUNK_LEAST),
        (2 * CHUNK_LEAST * CHUNK_TARGET_PROGRAMS, 2 * CHUNK_LEAST),
        (CHUNK_MOST * CHUNK_TARGET_PROGRAMS - 1, CHUNK_MOST // 2),
        (CHUNK_MOST * CHUNK_TARGET_PROGRAMS, CHUNK_MOST),
        (10**12, CHUNK_MOST),
    ],
)
def test_size_of_an_item(total, chunk):
    assert chunk_for(total) == chunk
    assert chunk % 8 == 0  # so that an item of an aligned tensor starts at a multiple of 16 bytes


def test_items_cover_every_element_once_and_in_order():
    sizes = [1, 0, 4096, 4097, 3 * 2**31]
    items = launches_for(sizes, 2**30)
    assert [(k, first) for k, first, _ in items] == sorted((k, first) for k, first, _ in items)
    for k, size in enumerate(sizes):
        mine = [(first, count) for j, first, count in items if j == k]
        assert sum(count for _, count in mine) == size
        assert all(first == i * 2**30 for i, (first, _) in enumerate(mine))


def test_fields_and_launches():
    column = [torch.zeros(5000), torch.zeros(3), torch.zeros(0), torch.zeros(9)[1:], torch.zeros(7).bfloat16()]
    layout = plan(
        [column, [None, *[t.clone() for t in column[1:]]]], partitions=[0, 0, 1, 1, 2], signs=[1, 1, 1, -1, 1]
    )
    by_key = {(launch.dtypes, launch.aligned): launch.items.tolist() for launch in layout.launches}
    assert by_key == {
        ((torch.float32,), True): [[0, 0, 4096, 0, 0, 1], [0, 4096, 904, 1, 0, 1], [1, 0, 3, 2, 0, 1]],
        ((torch.float32,), False): [[3, 0, 8, 3, 1, -1]],
        ((torch.bfloat16,), True): [[4, 0, 7, 4, 2, 1]],
    }
    assert layout.pointers.tolist()[0] == [column[0].data_ptr(), 0]
    assert layout.bounds.tolist() == [0, 3, 4, 5]
    assert (layout.slots, layout.partitions, layout.width) == (5, 3, 2)


def test_dtypes_of_roles():
    rows, out = [torch.zeros(4).bfloat16()], [torch.zeros(4)]
    assert plan([rows, out], roles=[0, 1]).launches[0].dtypes == (torch.bfloat16, torch.float32)
    assert plan([[None], out], roles=[0, 1]).launches[0].dtypes == (torch.float32, torch.float32)
    mixed = plan([rows, out, out], roles=[0, 0, 1])
    assert mixed.launches[0].dtypes == (torch.float32, torch.float32)
    assert mixed.keep[0][0].dtype == torch.float32


def test_tables_are_made_once():
    rows = [[torch.zeros(100), torch.zeros(7)] for _ in range(3)]
    first, again = plan(rows), plan(rows)
    assert again.pointers is first.pointers
    assert again.launches is first.launches
    rows[1][0] = torch.zeros(100)
    moved = plan(rows)
    assert moved.launches is first.launches  # sizes are as they were
    assert moved.pointers is not first.pointers
    assert moved.pointers[0, 1] == rows[1][0].data_ptr()


def test_old_tables_are_dropped():
    for size in range(1, 2 * table.KEPT):
        plan([[torch.zeros(size)]])
    assert len(table._tables) <= table.KEPT + 1


def test_constants_are_uploaded_once():
    assert table.constant([1, 2, 3], torch.device("cpu")) is table.constant([1, 2, 3], torch.device("cpu"))


def test_flat_views_with_a_stride_are_copied():
    base = torch.arange(12.0).reshape(3, 4)
    layout = plan([[base[:, ::2]]])
    assert layout.keep[0][0].is_contiguous()
    assert layout.pointers[0, 0] != base.data_ptr()


def test_reserve_runs_out_with_advice(monkeypatch):
    monkeypatch.setattr(table, "_reserve", [torch.zeros(4, dtype=torch.int64)])
    assert table._from_reserve(torch.tensor([7, 8, 9])).tolist() == [7, 8, 9]
    with pytest.raises(Exception, match="capture fewer graphs"):
        table._from_reserve(torch.tensor([1, 2]))


def tables(layout):
    launches = [(one.dtypes, one.aligned, one.items.tolist()) for one in layout.launches]
    return layout.pointers.tolist(), launches, layout.slots, layout.bounds.tolist(), layout.partitions


def of(*shape, dtype=torch.float32, skip=0):
    size = torch.Size(shape).numel()
    return torch.zeros(size + skip, dtype=dtype)[skip:].view(shape)


ROWS = [of(5000), of(3, 4), of()]


@pytest.mark.parametrize(
    ("lists", "roles", "usual"),
    [
        ([ROWS, [t.clone() for t in ROWS]], None, True),
        ([ROWS, [None] * 3, [torch.nn.Parameter(t) for t in ROWS]], [0, 0, 1], True),
        ([ROWS, [t.bfloat16() for t in ROWS]], [0, 1], True),
        ([[None] * 3, [t.bfloat16() for t in ROWS]], [0, 1], True),
        ([ROWS, [t.bfloat16() for t in ROWS]], None, False),  # two dtypes in a role
        ([ROWS, [ROWS[0], None, ROWS[2]]], None, False),
        ([[of(5000), of(4, 3).T, of()]], None, False),  # another order in memory
        ([[of(5000, skip=1), of(3, 4), of()]], None, False),  # not aligned
        ([[of(5000), of(0, 4), of()]], None, False),  # no items
        ([[of(5000), of(3, 4).double(), of()]], None, False),
        ([[t.to(torch.complex64) for t in ROWS]], None, False),
        ([[None] * 3], None, False),
        ([[]], None, False),
    ],
)
@pytest.mark.parametrize("more", [{}, {"partitions": [0, 1, 1], "signs": [1, -1, 1]}], ids=str)
def test_usual_lists_have_the_tables_of_all_others(monkeypatch, lists, roles, usual, more):
    assert (usual_of(lists, roles or [0] * len(lists)) is not None) is usual
    more = more if lists[0] else {}
    if not usual:
        return
    short = plan(lists, roles=roles, **more)
    monkeypatch.setattr(table, "usual_of", lambda lists, roles: None)
    assert tables(short) == tables(plan(lists, roles=roles, **more))
    assert all(
        a is b
        for mine, column in zip(short.keep, zip(*lists, strict=True), strict=True)
        for a, b in zip(mine, column, strict=True)
    )


class Slow(OrderedDict):
    """Lets another thread run after each look."""

    def get(self, key, default=None):
        found = super().get(key, default)
        time.sleep(1e-4)
        return found


def test_two_threads_do_not_disturb_each_other(monkeypatch):
    """Autograd has one thread per device: so many tables that each thread drops those of the other."""
    monkeypatch.setattr(table, "KEPT", 3)
    monkeypatch.setattr(table, "_tables", Slow())
    failures = []

    def work(seed):
        try:
            for k in range(200):
                values = [float((seed + k) % 5)]
                assert table.constant(values, torch.device("cpu")).tolist() == values
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
