"""The oracle, and the error budget that everything else is judged by, are tested themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import both_causal

from triflash import attention, testing
from triflash.testing import Case, make_inputs, run_case

FLOAT64 = Case(
    batch=2, seqlen_q=7, seqlen_k=5, nheads=4, nheads_k=2, headdim=3, headdim_v=4,
    dtype=torch.float64, with_dlse=True,
)  # fmt: skip


def _case(**changes) -> Case:
    return Case(**{**vars(FLOAT64), **changes})


@both_causal
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (7, 5), (5, 7), (1, 1), (3, 0)])
def test_gradcheck(causal, seqlen_q, seqlen_k, device):
    """Its backward is written by hand; here it meets finite differences. Rows without keys have
    constant out but lse -inf, so lse is checked where it is finite."""
    case = _case(causal=causal, seqlen_q=seqlen_q, seqlen_k=seqlen_k, softmax_scale=0.7)
    inputs = make_inputs(case, device)
    tensors = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    blind = max(0, seqlen_q - seqlen_k) if causal else (seqlen_q if seqlen_k == 0 else 0)

    def call(q, k, v):
        out, lse = attention(
            q, k, v, causal=causal, softmax_scale=0.7, return_lse=True, implementation="reference"
        )
        return out, lse[..., blind:]

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [7, 11])
def test_against_pytorch_sdpa(causal, seqlen_k, device):
    case = _case(seqlen_k=seqlen_k, headdim_v=3, causal=causal, with_dlse=False)
    inputs = make_inputs(case, device)
    got = testing.oracle(case, inputs)
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    expanded = (
        t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    )
    mask = torch.ones(7, seqlen_k, dtype=torch.bool, device=device).tril(seqlen_k - 7)
    out = F.scaled_dot_product_attention(*expanded, attn_mask=mask if causal else None)
    out = out.transpose(1, 2)
    torch.testing.assert_close(got["out"], out)
    expected = torch.autograd.grad(out, (q, k, v), inputs.dout)
    for name, grad in zip(("dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(got[name], grad)


def test_lse_is_the_log_of_the_sum(device):
    case = _case(nheads_k=4, causal=False)
    inputs = make_inputs(case, device)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs.q, inputs.k) * 3**-0.5
    torch.testing.assert_close(testing.oracle(case, inputs)["lse"], scores.exp().sum(-1).log())


@both_causal
def test_the_baseline_is_attention(causal, device):
    """`pytorch_attention` and its autograd against the reference, in float64 where both are exact,
    rows without keys included."""
    case = _case(seqlen_q=9, seqlen_k=6, causal=causal)
    inputs = make_inputs(case, device)
    expected = testing.oracle(case, inputs)
    for name, tensor in testing.baseline(case, inputs).items():
        torch.testing.assert_close(tensor, expected[name])


def test_inputs_depend_on_the_seed_alone(device):
    one, same, other = (make_inputs(_case(seed=seed), device) for seed in (1, 1, 2))
    for name in ("q", "k", "v", "dout", "dlse"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_hold_the_same_values(layout, device):
    case = _case(dtype=torch.float16, batch=1, headdim=40)
    plain = make_inputs(case, device).q
    other = make_inputs(_case(dtype=torch.float16, batch=1, headdim=40, layout=layout), device).q
    assert torch.equal(plain, other)
    assert other.stride(-1) == 1
    assert (layout == "contiguous") == (plain.stride() == other.stride())
    if layout in ("sliced", "misaligned"):
        assert (other.data_ptr() % 16 == 0) == (layout == "sliced")
        assert other._base.isnan().any()


class TestBudget:
    """What must fail, fails."""

    CASE = Case(batch=1, seqlen_q=40, seqlen_k=48, dtype=torch.float16, with_dlse=True)

    def _records(self, change, device, case=CASE):
        inputs = make_inputs(case, device)
        got = run_case(case, inputs, "reference")
        change(got)
        return {r.name: r.ok for r in testing.compare(case, inputs, got)}

    def test_right_results_pass(self, device):
        assert all(self._records(lambda got: None, device).values())

    @pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
    def test_one_wrong_element_fails(self, name, value, device):
        def spoil(got):
            got[name].view(-1)[17] = value

        ok = self._records(spoil, device)
        assert not ok.pop(name)
        assert all(ok.values())

    def test_one_percent_fails(self, device):
        def spoil(got):
            for tensor in got.values():
                tensor.mul_(1.01)

        assert not any(self._records(spoil, device).values())

    def test_half_precision_in_a_float32_result_fails(self, device):
        case = Case(**{**vars(self.CASE), "dtype": torch.float32})

        def spoil(got):
            for name, tensor in got.items():
                got[name] = tensor.half().float()

        assert not any(self._records(spoil, device, case).values())

    def test_tf32_in_a_float32_result_fails(self, device):
        """10 mantissa bits of q and k are not enough."""
        case = Case(**{**vars(self.CASE), "dtype": torch.float32})
        inputs = make_inputs(case, device)
        tf32 = testing.Inputs(
            *(t.half().float() for t in (inputs.q, inputs.k)), inputs.v, inputs.dout, inputs.dlse
        )
        records = testing.compare(case, inputs, run_case(case, tf32, "reference"))
        assert not any(r.ok for r in records)

    def test_a_wrong_dtype_or_shape_is_not_compared(self, device):
        inputs = make_inputs(self.CASE, device)
        got = run_case(self.CASE, inputs, "reference")
        for wrong in (got["out"].float(), got["out"][:, 1:]):
            with pytest.raises(AssertionError, match="out"):
                testing.compare(self.CASE, inputs, {**got, "out": wrong})

    def test_nan_in_the_budget_fails(self):
        assert not testing.Record("out", 0.0, float("nan")).ok
        assert not testing.Record("out", float("nan"), float("inf")).ok

    def test_missing_rows_of_lse(self, device):
        """-inf where there are keys, or a number where there are none."""
        case = Case(batch=1, seqlen_q=40, seqlen_k=20, dtype=torch.float32, causal=True)

        def spoil(got):
            got["lse"][..., 3] = -1e30

        assert not self._records(spoil, device, case)["lse"]


def test_poison(device):
    def empties():
        return [
            torch.empty(9, device=device),
            torch.empty_like(torch.ones(9, device=device, dtype=torch.float16)),
            torch.ones(1, device=device).new_empty(9),
            torch.empty_strided((3, 3), (3, 1), device=device),
        ]

    before = torch.are_deterministic_algorithms_enabled()
    with testing.poisoned():
        assert all(t.isnan().all() for t in empties())
    assert torch.are_deterministic_algorithms_enabled() == before
