"""The Gramian kernels against the float64 twin, in the interpreter."""

import dataclasses

import pytest
import torch

from gradsurg.linalg import reference
from gradsurg.linalg.kernels import dots, gramian, pairs, table
from gradsurg.linalg.kernels.dispatch import gramian_kernel
from tests.kernels.interpreted.harness import DTYPES, SIZES, make_rows, permuted, reads, times_read

# Of |g_i| |g_j|: float64 sums of exact products, on Gaussian rows of any dtype.
ROUNDING = 1e-15


def error(G, rows, like):
    wanted = reference.gramian(rows, like)
    lengths = wanted.diagonal().sqrt().clamp(min=1e-300)
    return float(((G - wanted).abs() / (lengths[:, None] * lengths)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16])
def test_matches_the_twin(m, dtype):
    rows, like = make_rows(m, SIZES, dtype)
    G = gramian.gramian(rows)
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    assert error(G, rows, like) <= ROUNDING


# Every dtype in each kernel that the quick test leaves out; unions of tiles with a small tile, a full one, or both.
MORE = [
    *((7, dtype) for dtype in DTYPES),
    *((17, dtype) for dtype in DTYPES),
    (13, torch.float32),
    (27, torch.bfloat16),
    (32, torch.float32),
    (33, torch.bfloat16),
    (48, torch.float32),
    (50, torch.float32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("m", "dtype"), MORE)
def test_matches_the_twin_for_more_tasks(m, dtype):
    rows, like = make_rows(m, [7, 0, 8, 129] if m > 16 else SIZES, dtype)
    G = gramian.gramian(rows)
    assert torch.equal(G, G.T)
    assert error(G, rows, like) <= ROUNDING


@pytest.mark.parametrize("m", [2, 8, 11])
def test_tasks_that_did_not_reach_a_parameter(m):
    rows, like = make_rows(m, SIZES, missing=0.5)
    for row in rows:
        row[4] = None  # a parameter that nobody reached
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING
    assert torch.equal(gramian.gramian([[None] * 3] * m), torch.zeros(m, m, dtype=torch.float64))


@pytest.mark.parametrize("m", [3, 9])
@pytest.mark.parametrize("size", [table.CHUNK_LEAST - 1, table.CHUNK_LEAST, table.CHUNK_LEAST + 1, 9001])
def test_larger_than_an_item(m, size):
    rows, like = make_rows(m, [size, 5])
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING


@pytest.mark.parametrize(("m", "longest"), [(4, 32), (16, 4096)])
def test_constant_rows_do_not_drift(m, longest):
    # A running float32 sum of 131 072 such products is off by 7e-5. In float64 each addition of the longest chain of an
    # item of 4096 elements may be off by 2^-53 of what it has so far, half of the sum on average.
    rows = [[torch.full((8_001,), 0.1 + 0.01 * i)] for i in range(m)]
    assert error(gramian.gramian(rows), rows, [torch.zeros(8_001)]) <= longest / 2 * 2.0**-53


def test_mixed_dtypes_and_alignments():
    rows, like = make_rows(3, [300, 301, 302, 303])
    for row in rows:
        row[0] = row[0].bfloat16()
        row[1] = row[1].half()
        row[2] = torch.cat([torch.zeros(1), row[2]])[1:]  # 4 bytes past a multiple of 16
        row[3] = row[3].double()
    assert rows[0][2].data_ptr() % 16 != 0
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING
    rows[0][3] = rows[0][3].float()  # two dtypes of one parameter
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 4, 8, 10])
def test_unaligned(m, dtype):
    rows, like = make_rows(m, [1, 17, 514], dtype)
    rows = [[torch.cat([g[:1], g])[1:] for g in row] for row in rows]
    assert all(g.data_ptr() % 16 for row in rows for g in row)
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING


def test_layouts_and_complex_numbers():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rows = [
        [
            draw(4, 6, 3, 3).to(memory_format=torch.channels_last),
            draw(20, 30).T if i else draw(30, 20),  # two orders of elements
            draw(9, 8)[:, ::2],
            draw(33, dtype=torch.complex64),
        ]
        for i in range(3)
    ]
    assert error(gramian.gramian(rows), rows, rows[0]) <= ROUNDING


def test_one_gramian_a_block():
    sizes = [100, 0, 257, 31, 5000, 2]
    rows, _ = make_rows(4, sizes)
    blocks = [0, 1, 2, 2, 3, 5]
    got = gramian.gramian(rows, partitions=blocks)
    assert got.shape == (6, 4, 4)
    for block in range(6):
        mine = [k for k, other in enumerate(blocks) if other == block]
        part = [[row[k] for k in mine] for row in rows]
        assert (got[block] - (gramian.gramian(part) if mine else 0)).abs().max() <= 1e-11
    assert (got[1] == 0).all()  # an empty tensor
    assert (got[4] == 0).all()  # no parameter at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [3, 8, 16, 20])
def test_each_element_is_read_once(m, dtype):
    rows, _ = make_rows(m, [1, 9, 700, 4200], dtype, missing=0.2)
    with reads() as counts:
        gramian.gramian(rows)
    assert {times for row in rows for g in row if g is not None for times in times_read(counts, g)} == {1}


@pytest.mark.parametrize("m", [3, 12])
def test_order_of_programs_does_not_matter(m, monkeypatch):
    rows, _ = make_rows(m, [4200, 9, 300, 8300])
    wanted = gramian.gramian(rows)
    plan = gramian.plan

    def shuffled(*args, **kwargs):
        layout = plan(*args, **kwargs)
        launches = [dataclasses.replace(one, items=permuted(one.items, 3)) for one in layout.launches[::-1]]
        return dataclasses.replace(layout, launches=tuple(launches))

    monkeypatch.setattr(gramian, "plan", shuffled)
    assert torch.equal(gramian.gramian(rows), wanted)


def test_order_of_tasks_does_not_matter():
    rows, _ = make_rows(7, [1000, 33])
    order = [3, 0, 6, 2, 5, 1, 4]
    G = gramian.gramian(rows)
    assert torch.equal(gramian.gramian([rows[i] for i in order]), G[order][:, order])


@pytest.mark.parametrize("m", [2, 20])
def test_tensors_of_more_than_two_to_the_31_elements(m, monkeypatch):
    """An item 3 · 2³¹ elements into a tensor: addresses and offsets are moved by as much in opposite directions."""
    rows, like = make_rows(m, [130])
    far = 3 * 2**31
    plan = gramian.plan

    def moved(*args, **kwargs):
        layout = plan(*args, **kwargs)
        launches = []
        for launch in layout.launches:
            items = launch.items.clone()
            items[:, 1] += far
            launches.append(dataclasses.replace(launch, items=items))
        return dataclasses.replace(layout, pointers=layout.pointers - 4 * far, launches=tuple(launches))

    monkeypatch.setattr(gramian, "plan", moved)
    assert error(gramian.gramian(rows), rows, like) <= ROUNDING


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity times 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    rows, _ = make_rows(5, [100, 50])
    rows[2][1][7] = bad
    finite = torch.isfinite(gramian.gramian(rows))
    clean = torch.tensor([True, True, False, True, True])
    assert torch.equal(finite, clean[:, None] & clean)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_pairs_cover_the_upper_triangle_once(m):
    assert gramian_kernel(m).tasks == m
    assert sorted(pairs.pair_places(m)) == sorted((i, j) for i in range(m) for j in range(i, m))


@pytest.mark.parametrize("tiles", [1, 2])
def test_tiles_cover_the_upper_triangle_once(tiles):
    places = [(i, j) for i, j in dots.dot_places(tiles) if i <= j]
    m = tiles * dots.TILE
    assert sorted(places) == sorted((i, j) for i in range(m) for j in range(i, m))
