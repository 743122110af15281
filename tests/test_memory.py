"""How tensors lie in memory, what is read and written of them, and what is kept."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from helpers import (
    GPU,
    KERNEL_ROWS,
    LOW_PRECISION,
    assert_bitwise_equal,
    assert_repeated,
    assert_within_budget,
    both_causal,
    check,
    every_differentiable_row,
    every_kernel_row,
    every_row,
    every_triton_row,
    results,
    skip_unreadable,
    skip_unsupported,
)

from triflash import attention, registry, testing
from triflash.testing import LAYOUTS, Case, Inputs, laid_out, make_inputs, run_case

N = 500 if GPU else 33
SMALL = Case(
    batch=2, seqlen_q=N, seqlen_k=N + 3, nheads=2, nheads_k=1, headdim=16, dtype=LOW_PRECISION,
    causal=True, with_dlse=True,
)  # fmt: skip


def _with(case: Case, **changes) -> Case:
    return Case(**{**vars(case), **changes})


@every_row
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("headdim", [33, 40, 64])
def test_layouts(implementation, use_tma, layout, headdim, device, tuned):
    tuned.use_tma(use_tma)
    check(_with(SMALL, layout=layout, headdim=headdim), implementation, device)


@every_triton_row
def test_tma_is_used_where_it_is_asked_for_and_can_be(implementation, device, tuned, monkeypatch):
    """Else the tests above would test pointers twice."""
    from triflash.kernels.common import launch

    if implementation.startswith("v1"):
        pytest.skip(f"{implementation} loads by pointers on every GPU")
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("this GPU has no TMA")
    made: list[object] = []
    original = launch.TensorDescriptor

    def descriptor(*args, **kwargs):
        made.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(launch, "TensorDescriptor", descriptor)
    for use_tma, layout, used in (
        (True, "contiguous", True),
        (True, "sliced", True),
        (True, "misaligned", False),
        (False, "contiguous", False),
    ):
        tuned.use_tma(use_tma)
        made.clear()
        results(_with(SMALL, batch=1, layout=layout), implementation, device)
        assert bool(made) == used, (use_tma, layout)


@every_row
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
def test_junk_strides_of_single_entries(implementation, use_tma, device, tuned):
    """A stride of a dimension of size 1 means nothing, whatever it says."""
    tuned.use_tma(use_tma)
    for batch, seqlen, nheads in ((1, N, 1), (1, 1, 2), (1, 1, 1)):
        case = Case(
            batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, nheads=nheads, nheads_k=nheads,
            headdim=16, dtype=LOW_PRECISION, with_dlse=True,
        )  # fmt: skip
        check(_with(case, layout="junk_strides"), implementation, device)
        junk = results(_with(case, layout="junk_strides"), implementation, device)
        plain = results(case, implementation, device)
        assert_repeated(implementation, case, make_inputs(case, device), plain, junk)


@every_row
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
def test_misaligned_bases(implementation, use_tma, device, tuned):
    """Base pointers between multiples of 16 bytes, one argument at a time."""
    tuned.use_tma(use_tma)
    case = _with(SMALL, batch=1)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    expected = run_case(case, inputs, implementation)
    for name, offset in (("q", 1), ("k", 2), ("v", 4), ("dout", 1), ("dout", 4)):
        tensor = getattr(inputs, name)
        storage = tensor.new_full((tensor.numel() + 8,), float("nan"))
        moved = storage[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
        changed = _replaced(inputs, name, moved)
        if registry.get(implementation).needs_tma and name != "dout":
            with pytest.raises(NotImplementedError, match="multiples of 16 bytes"):
                run_case(case, changed, implementation)
            continue
        got = run_case(case, changed, implementation)
        assert_within_budget(case, testing.compare(case, inputs, got))
    # The tensors that lie as before must not be affected by launches prepared for the others.
    again = run_case(case, inputs, implementation)
    assert_repeated(implementation, case, inputs, expected, again)


def _replaced(inputs: Inputs, name: str, tensor: torch.Tensor) -> Inputs:
    return Inputs(**{**vars(inputs), name: tensor})


@every_row
@both_causal
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("layout", ["sliced", "misaligned"])
@pytest.mark.parametrize("headdim", [40, 64])
def test_nothing_beyond_the_tensors_is_read(
    implementation, causal, use_tma, layout, headdim, device, tuned
):
    """NaN, or 1e4, around every tensor must not change a bit."""
    tuned.use_tma(use_tma)
    case = _with(SMALL, batch=1, causal=causal, headdim=headdim)
    skip_unsupported(_with(case, layout=layout), implementation, device)
    plain = make_inputs(case, device)

    def surrounded_by(fill: float) -> dict[str, torch.Tensor]:
        around = (laid_out(t, layout, fill) for t in (plain.q, plain.k, plain.v, plain.dout))
        return run_case(case, Inputs(*around, plain.dlse), implementation)

    quiet = surrounded_by(0.0)
    for fill in (float("nan"), 1e4, *([float("inf")] if GPU else [])):
        assert_repeated(implementation, case, plain, quiet, surrounded_by(fill))


@every_kernel_row
@both_causal
@pytest.mark.parametrize("headdim", [40, 64])
def test_nothing_is_written_beyond_the_outputs(
    implementation, causal, headdim, device, monkeypatch
):
    """Whatever is allocated during a call gets a margin on both sides, which must stay as it is."""
    case = _with(SMALL, causal=causal, headdim=headdim, headdim_v=24)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    margin, sentinel = 4096, 12345.0
    buffers: list[torch.Tensor] = []
    full = torch.full

    def empty(*size, dtype=None, device=None, **_):
        shape = torch.Size(size[0] if isinstance(size[0], list | tuple) else size)
        buffer = full((shape.numel() + 2 * margin,), sentinel, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[margin : margin + shape.numel()].view(shape)

    def empty_like(x, dtype=None, **_):
        return empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def new_empty(x, *size, dtype=None, **_):
        return empty(*size, dtype=dtype or x.dtype, device=x.device)

    def new_zeros(x, *size, **options):
        return new_empty(x, *size, **options).zero_()

    def full_like(x, fill, **options):
        return empty_like(x, **options).fill_(fill)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch, "full_like", full_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    got = run_case(case, inputs, implementation)
    monkeypatch.undo()
    assert len(buffers) >= len(got)
    for buffer in buffers:
        assert (buffer[:margin] == sentinel).all()
        assert (buffer[-margin:] == sentinel).all()
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_row
def test_hidden_keys_do_not_matter(implementation, device):
    """What a causal mask hides from a query must not change a bit of its row."""
    case = Case(batch=1, seqlen_q=N, seqlen_k=N + 40, headdim=16, dtype=LOW_PRECISION, causal=True)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    before = run_case(case, inputs, implementation, backward=False)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, -5:], v[:, -5:] = 9.0, -9.0
    changed = Inputs(inputs.q, k, v, inputs.dout, None)
    after = run_case(case, changed, implementation, backward=False)
    assert torch.equal(before["out"][:, :-5], after["out"][:, :-5])
    assert torch.equal(before["lse"][..., :-5], after["lse"][..., :-5])
    assert (before["lse"][..., -5:] != after["lse"][..., -5:]).any(dim=(0, 1)).all()


@every_row
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
def test_packed_qkv(implementation, use_tma, device, tuned):
    """Slices of one (batch, seqlen, 3, nheads, headdim) tensor, whose gradients join in it."""
    tuned.use_tma(use_tma)
    case = Case(batch=2, seqlen_q=N, seqlen_k=N, headdim=16, dtype=torch.float32, causal=True)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    packed = torch.stack((inputs.q, inputs.k, inputs.v), dim=2).requires_grad_()
    q, k, v = packed.unbind(dim=2)
    out, lse = attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
    (grad,) = torch.autograd.grad(out, packed, inputs.dout)
    got = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grad.unbind(2), strict=True))}
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_row
def test_expanded_inputs(implementation, device):
    """k and v shared by the batch through a stride of 0, which TMA would refuse."""
    case = Case(batch=3, seqlen_q=N, seqlen_k=N, headdim=16, dtype=LOW_PRECISION, with_dlse=True)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    k, v = (t[:1].expand_as(t) for t in (inputs.k, inputs.v))
    skip_unreadable(implementation, inputs.q, k, v)
    inputs = Inputs(inputs.q, k, v, inputs.dout, inputs.dlse)
    got = run_case(case, inputs, implementation)
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_differentiable_row
@pytest.mark.parametrize("how", ["sum", "expanded", "reversed", "one_column"])
def test_gradients_that_arrive_with_odd_strides(implementation, how, device):
    case = _with(SMALL, with_dlse=False, batch=2)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    dout = {
        "sum": torch.ones((), dtype=case.dtype, device=device).expand_as(inputs.dout),
        "expanded": inputs.dout[:1].expand_as(inputs.dout),
        "reversed": inputs.dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "one_column": inputs.dout[..., :1].expand_as(inputs.dout),
    }[how]
    inputs = _replaced(inputs, "dout", dout)
    got = run_case(case, inputs, implementation)
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_differentiable_row
def test_gradient_of_lse_with_odd_strides(implementation, device):
    case = _with(SMALL, batch=2)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    for dlse in (inputs.dlse[:1].expand_as(inputs.dlse), inputs.dlse.mT.contiguous().mT):
        changed = _replaced(inputs, "dlse", dlse)
        got = run_case(case, changed, implementation)
        assert_within_budget(case, testing.compare(case, changed, got))


@every_differentiable_row
def test_only_lse_is_differentiated(implementation, device):
    case = _with(SMALL)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    _, lse = attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
    grads = torch.autograd.grad(lse, (q, k, v), inputs.dlse)
    changed = _replaced(inputs, "dout", torch.zeros_like(inputs.dout))
    got = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert_within_budget(case, testing.compare(case, changed, got))
    assert (grads[2] == 0).all()


@every_differentiable_row
@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_gradients_of_some_inputs(implementation, wanted, device):
    case = _with(SMALL)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    everything = run_case(case, inputs, implementation)
    tensors = {n: getattr(inputs, n).detach().requires_grad_(n in wanted) for n in "qkv"}
    out, lse = attention(**tensors, causal=True, return_lse=True, implementation=implementation)
    grads = torch.autograd.grad(
        (out, lse), [tensors[n] for n in wanted], (inputs.dout, inputs.dlse)
    )
    got = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    assert_repeated(implementation, case, inputs, everything, everything | got)


@every_row
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_inputs_are_never_modified(implementation, layout, device):
    case = _with(SMALL, layout=layout, with_dlse=True)
    skip_unsupported(case, implementation, device)
    inputs, before = make_inputs(case, device), make_inputs(case, device)
    versions = {name: tensor._version for name, tensor in inputs.tensors.items()}
    run_case(case, inputs, implementation)
    assert_bitwise_equal(before.tensors, inputs.tensors)
    assert versions == {name: tensor._version for name, tensor in inputs.tensors.items()}


@every_differentiable_row
def test_backward_twice_over_one_graph(implementation, device):
    """Nothing saved is used up: the second gradient is the first."""
    case = _with(SMALL, with_dlse=False)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = attention(q, k, v, causal=True, implementation=implementation)
    first = torch.autograd.grad(out, (q, k, v), inputs.dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), inputs.dout)
    first, second = (dict(zip(("dq", "dk", "dv"), g, strict=True)) for g in (first, second))
    assert_repeated(implementation, case, inputs, first, second)


@every_row
@both_causal
def test_results_are_bitwise_the_same_in_every_run(implementation, causal, device):
    case = _with(SMALL, causal=causal, batch=1, headdim=64)
    if GPU:
        case = _with(case, seqlen_q=2000, seqlen_k=2100, nheads=8, nheads_k=4)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    first = run_case(case, inputs, implementation)
    for _ in range(9):
        again = run_case(case, inputs, implementation)
        assert_repeated(implementation, case, inputs, first, again)


@every_row
def test_a_sequence_does_not_depend_on_the_batch(implementation, device):
    """Bitwise: what else is in the batch, and which head it is, must not matter."""
    case = _with(SMALL, batch=3)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    if implementation not in KERNEL_ROWS:
        pytest.skip("a matrix library may sum in another order for another batch size")
    backward = implementation != "v2_torch"  # its gradients come from such a library
    whole = run_case(case, inputs, implementation, backward)
    one = Inputs(**{name: tensor[1:2] for name, tensor in inputs.tensors.items()})
    part = {name: tensor[1:2] for name, tensor in whole.items()}
    case = _with(case, batch=1)
    assert_repeated(implementation, case, one, part, run_case(case, one, implementation, backward))


@every_differentiable_row
@both_causal
def test_what_the_backward_keeps(implementation, causal, device):
    """Beside the inputs and out only lse, and what the registry's row names (SEEDS 0.5, 2.1)."""
    case = Case(
        batch=4, seqlen_q=128, seqlen_k=128, nheads=1, nheads_k=1, headdim=64, dtype=torch.float32
    )
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, lse = attention(q, k, v, causal=causal, return_lse=True, implementation=implementation)
    known = {t.data_ptr() for t in (q, k, v, out)}
    rest = [t for t in kept if t.data_ptr() not in known]
    names = registry.get(implementation).saves
    assert [tuple(t.shape) for t in rest] == [(4, 1, 128)] * (1 + len(names))
    assert all(t.dtype == torch.float32 for t in rest)
    assert rest[0].data_ptr() == lse.data_ptr()
    if implementation == "v2":
        assert len(rest) == 1


@every_row
def test_nothing_is_kept_without_grad(implementation, device):
    case = _with(SMALL)
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    q = inputs.q.detach().requires_grad_()
    with torch.no_grad():
        out = attention(q, inputs.k, inputs.v, implementation=implementation)
    assert out.grad_fn is None
    with torch.inference_mode():
        out = attention(inputs.q, inputs.k, inputs.v, implementation=implementation)
    assert out.is_inference()


@every_differentiable_row
def test_no_reference_to_a_tensor_outlives_it(implementation, device):
    """No cycle and no cache holds inputs, outputs or gradients."""
    case = _with(SMALL, batch=1)
    skip_unsupported(case, implementation, device)
    gc.collect()
    gc.disable()
    try:
        inputs = make_inputs(case, device)
        q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        out, lse = attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
        grads = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
        alive = [weakref.ref(t) for t in (q, k, v, out, lse, *grads, inputs.dout, inputs.dlse)]
        del inputs, q, k, v, out, lse, grads
        for _ in range(100):  # autograd's thread drops its own a moment after it has answered
            if not any(ref() is not None for ref in alive):
                break
            time.sleep(0.01)
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


@every_kernel_row
def test_poison_is_seen(implementation, device, monkeypatch):
    """The tests' own trap: a kernel that writes nothing must fail the check."""
    case = _with(SMALL, batch=1)
    skip_unsupported(case, implementation, device)
    for launch in ("common.launch", "cuda.forward"):
        name = f"triflash.kernels.{launch}.Launch.__call__"
        monkeypatch.setattr(name, lambda self, *tensors, **_: None)
    records = testing.check_case(case, implementation, device)
    assert [record.ok for record in records] == [False] * 5
