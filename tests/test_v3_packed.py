"""v3's lists of the blocks of packed sequences, and where they lie in workspaces."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl
from helpers import GPU
from test_varlen import int32

from triflash import testing
from triflash.kernels.v3 import packed
from triflash.spec import Sequences, make_varlen_spec

_LENGTHS = (0, 1, 63, 64, 65, 128, 300, 1000)


def sequences_of(seed: int) -> tuple[list[int], list[int], list[int] | None, list[int] | None]:
    """Rows of q and of k, and how many take part."""
    choose = random.Random(seed)
    batch = (1, 3, 12, 300)[seed % 4]
    lengths = _LENGTHS if GPU or batch < 300 else _LENGTHS[:5]  # the interpreter is slow
    rows_q, rows_k = ([choose.choice(lengths) for _ in range(batch)] for _ in range(2))
    used_q, used_k = ([choose.randint(0, n) for n in rows] for rows in (rows_q, rows_k))
    return rows_q, rows_k, used_q if seed % 3 else None, used_k if seed % 2 else None


def starts_of(rows: list[int]) -> list[int]:
    return [sum(rows[:i]) for i in range(len(rows) + 1)]


def listed(where: Sequences, totals: tuple[int, int], block: int, of_keys: bool) -> torch.Tensor:
    """The list; of the rows behind its count, none may be written."""
    device = where.cu_seqlens_q.device
    x = torch.empty(max(totals), 1, 64, dtype=torch.float16, device=device)
    q, k = (x[:total] for total in totals)
    spec = make_varlen_spec(q, k, k, where, *totals, None, False, False, False)
    launch = packed.list_launch(spec, block, of_keys)
    most = packed.most_blocks(totals[of_keys], spec.batch, block)
    with testing.poisoned():
        blocks = packed.list_blocks(launch, q, k, where, most, 7).cpu()
    assert int(blocks[0, 1]) == 7
    assert (blocks[1 + int(blocks[0, 0]) :] == torch.iinfo(torch.int32).max).all()
    return blocks


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("seed", range(8 if GPU else 4))
def test_the_list_has_every_block_those_that_take_longest_first(seed, of_keys, device):
    rows_q, rows_k, used_q, used_k = sequences_of(seed)
    starts_q, starts_k = starts_of(rows_q), starts_of(rows_k)
    where = Sequences(*(int32(x, device) for x in (starts_q, starts_k, used_q, used_k)))
    seqlens_q, seqlens_k = used_q or rows_q, used_k or rows_k
    block = 64
    got = listed(where, (starts_q[-1], starts_k[-1]), block, of_keys)

    rows, own, other = (rows_k, seqlens_k, seqlens_q) if of_keys else (rows_q, seqlens_q, seqlens_k)
    expected = []
    for b in sorted(range(len(rows)), key=lambda b: (-other[b], b)):
        of_b = range(0, rows[b], block)
        for start in of_b if of_keys else reversed(of_b):
            lengths = [seqlens_q[b], seqlens_k[b]]
            if start >= own[b]:  # takes no part: nothing on the other side
                lengths[0 if of_keys else 1] = 0
            of_q = [starts_q[b], rows_q[b], lengths[0]]
            expected.append([start, b, *of_q, starts_k[b], rows_k[b], lengths[1]])
    count = int(got[0, 0])
    assert got[1 : 1 + count].tolist() == expected


@pytest.mark.parametrize("values", [(0, 900, 8), (0, 8, 0, 8), (-(2**30), 5, 8), (0, 5, 2**30)])
@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
def test_the_list_stays_inside_whatever_cu_seqlens_says(values, of_keys, device):
    cu_seqlens = int32(values, device)
    got = listed(Sequences(cu_seqlens, cu_seqlens), (8, 8), 1, of_keys)
    count = int(got[0, 0])
    assert count < len(got)
    start, _, start_q, rows_q, seqlen_q, start_k, rows_k, seqlen_k = got[1 : 1 + count].unbind(1)
    for x in (start, start_q, rows_q, seqlen_q, start_k, rows_k, seqlen_k):
        assert ((x >= 0) & (x <= 8)).all()
    assert (start_q + rows_q <= 8).all()
    assert (start_k + rows_k <= 8).all()


@triton.jit
def _places_kernel(CuSeqlens, Places, batch, total, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    first, start, rows, _ = packed.place_of_block(CuSeqlens, None, block, batch, total, BLOCK)
    tl.store(Places + 3 * block, first)
    tl.store(Places + 3 * block + 1, start)
    tl.store(Places + 3 * block + 2, rows)


@pytest.mark.parametrize("seed", range(8 if GPU else 4))
def test_no_two_sequences_share_a_block_of_a_workspace(seed, device):
    rows, *_ = sequences_of(seed)
    starts, block = starts_of(rows), 64
    most = packed.most_blocks(starts[-1], len(rows), block)
    places = torch.zeros(most, 3, dtype=torch.int32, device=device)
    _places_kernel[(most,)](int32(starts, device), places, len(rows), starts[-1], block)
    got = {i: tuple(p) for i, p in enumerate(places.tolist()) if p[0] < p[2]}
    expected = {
        starts[b] // block + b + i: (i * block, starts[b], rows[b])
        for b in range(len(rows))
        for i in range(-(-rows[b] // block))
    }
    assert len(expected) == sum(-(-n // block) for n in rows)
    assert got == expected
