"""Packed sequences: each by itself within the error budget, whatever lies around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    GPU,
    KERNEL_DTYPES,
    LOW_PRECISION,
    assert_bitwise_equal,
    captured,
    every_dtype,
    forget_prepared_launches,
    in_a_new_process,
    repeatable,
    without_waiting,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triflash import attention, flash_attn_varlen_func, ops, registry, sequences, spec, testing
from triflash.kernels.common.launch import Launch
from triflash.spec import Sequences, make_varlen_spec
from triflash.target import target_of
from triflash.testing import Case, Inputs

NAN = float("nan")
ROWS = [row.name for row in registry.IMPLEMENTATIONS if "varlen" in row.features]
every_row = pytest.mark.parametrize("implementation", ROWS)
both_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
BIG = 20 if GPU else 1  # what lengths are multiplied with where a GPU runs them


@dataclass(frozen=True)
class Packed:
    """A packed call: the lengths of its sequences, how much of each takes part, and options."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    nheads: int = 2
    nheads_k: int = 2
    headdim: int = 32
    headdim_v: int | None = None
    dtype: torch.dtype = torch.float16
    causal: bool = False
    softmax_scale: float | None = None
    with_dlse: bool = False
    seed: int = 0

    def starts(self) -> tuple[list[int], list[int]]:
        return tuple(
            [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            for lengths in (self.lengths_q, self.lengths_k)
        )

    def sequence(self, i: int) -> Case:
        """The i-th sequence as a call by itself."""
        used_q = self.lengths_q if self.used_q is None else self.used_q
        used_k = self.lengths_k if self.used_k is None else self.used_k
        return Case(
            1, used_q[i], used_k[i], self.nheads, self.nheads_k, self.headdim, self.headdim_v,
            self.dtype, self.causal, self.softmax_scale, False, self.with_dlse, seed=self.seed,
        )  # fmt: skip

    def rows(self, i: int) -> tuple[slice, slice]:
        """The rows of q and of k that take part in it."""
        case, (starts_q, starts_k) = self.sequence(i), self.starts()
        return (
            slice(starts_q[i], starts_q[i] + case.seqlen_q),
            slice(starts_k[i], starts_k[i] + case.seqlen_k),
        )


def inputs_of(call: Packed, device, fill: float = NAN) -> Inputs:
    """Packed inputs; rows that take no part are `fill`."""
    generator = torch.Generator(device).manual_seed(call.seed)
    wide = torch.promote_types(call.dtype, torch.float32)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=wide, device=device)

    headdim_v = call.headdim_v or call.headdim
    total_q, total_k = sum(call.lengths_q), sum(call.lengths_k)
    q = normal(total_q, call.nheads, call.headdim).to(call.dtype)
    k = normal(total_k, call.nheads_k, call.headdim).to(call.dtype)
    v = normal(total_k, call.nheads_k, headdim_v).to(call.dtype)
    dout = normal(total_q, call.nheads, headdim_v).to(call.dtype)
    dlse = normal(call.nheads, total_q) if call.with_dlse else None
    unused_q, unused_k = unused(call, device)
    for x, rows in ((q, unused_q), (k, unused_k), (v, unused_k), (dout, unused_q)):
        x[rows] = fill
    if dlse is not None:
        dlse[:, unused_q] = fill
    return Inputs(q, k, v, dout, dlse)


def unused(call: Packed, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of q and of k take no part."""
    all_q, all_k = (
        torch.ones(sum(lengths), dtype=torch.bool, device=device)
        for lengths in (call.lengths_q, call.lengths_k)
    )
    for i in range(len(call.lengths_q)):
        rows_q, rows_k = call.rows(i)
        all_q[rows_q], all_k[rows_k] = False, False
    return all_q, all_k


def int32(values, device) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def refusal(call: Packed, implementation: str, device) -> str | None:
    """Why the row cannot run a call, if it cannot."""
    lengths = (sum(call.lengths_q), sum(call.lengths_k))
    q = torch.empty(lengths[0], call.nheads, call.headdim, dtype=call.dtype, device=device)
    k = torch.empty(lengths[1], call.nheads_k, call.headdim, dtype=call.dtype, device=device)
    v = k.new_empty(*k.shape[:2], call.headdim_v or call.headdim)
    cu_seqlens = (int32(starts, device) for starts in call.starts())
    where = Sequences(*cu_seqlens, int32(call.used_q, device), int32(call.used_k, device))
    longest = (max(lengths, default=0) for lengths in (call.lengths_q, call.lengths_k))
    spec = make_varlen_spec(q, k, v, where, *longest, None, call.causal, False, False)
    return registry.get(implementation).supports(spec, target_of(device))


def run(call: Packed, inputs: Inputs, implementation: str, longer: int = 0, **options):
    """The results of one call; max_seqlen may be `longer` than it must."""
    device = inputs.q.device
    if reason := refusal(call, implementation, device):
        pytest.skip(reason)
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    cu_seqlens = [int32(starts, device) for starts in call.starts()]
    if call.lengths_q == call.lengths_k:  # one tensor, as models give it
        cu_seqlens[1] = cu_seqlens[0]
    longest = (max(lengths, default=0) + longer for lengths in (call.lengths_q, call.lengths_k))
    with testing.poisoned():
        out, lse, probabilities = flash_attn_varlen_func(
            q, k, v, *cu_seqlens, *longest,
            causal=call.causal,
            softmax_scale=call.softmax_scale,
            return_attn_probs=True,
            seqused_q=int32(call.used_q, device),
            seqused_k=int32(call.used_k, device),
            implementation=implementation,
            **options,
        )  # fmt: skip
        assert probabilities is None
        outputs, gradients = (out, lse), (inputs.dout, inputs.dlse)
        n = 2 if call.with_dlse else 1
        grads = torch.autograd.grad(outputs[:n], (q, k, v), gradients[:n])
    results = {"out": out.detach(), "lse": lse.detach()}
    return results | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def parts(call: Packed, results: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """What the results say of sequence i, in the shapes of a call by itself."""
    rows_q, rows_k = call.rows(i)
    of = {"out": rows_q, "dq": rows_q, "dk": rows_k, "dv": rows_k}
    split = {name: results[name][rows].unsqueeze(0) for name, rows in of.items()}
    return {**split, "lse": results["lse"][:, rows_q].unsqueeze(0)}


def check(call: Packed, implementation: str, device, **options) -> dict[str, torch.Tensor]:
    inputs = inputs_of(call, device)
    results = run(call, inputs, implementation, **options)
    unused_q, unused_k = unused(call, device)
    for name, rows in (("out", unused_q), ("dq", unused_q), ("dk", unused_k), ("dv", unused_k)):
        assert not results[name][rows].any(), f"{call}: {name} is not 0 in rows without part"
    assert (results["lse"][:, unused_q] == float("-inf")).all()
    for i in range(len(call.lengths_q)):
        case, (rows_q, rows_k) = call.sequence(i), call.rows(i)
        alone = Inputs(
            inputs.q[None, rows_q], inputs.k[None, rows_k], inputs.v[None, rows_k],
            inputs.dout[None, rows_q],
            None if inputs.dlse is None else inputs.dlse[None, :, rows_q],
        )  # fmt: skip
        over = [r for r in testing.compare(case, alone, parts(call, results, i)) if not r.ok]
        assert not over, f"{call}, sequence {i}: " + ", ".join(
            f"{r.name} is off by {r.error:.2e}, allowed {r.allowed:.2e}" for r in over
        )
    return results


CALLS = {
    "mixed": Packed((5, 40, 33, 70), (5, 40, 33, 70)),
    "other lengths of k": Packed((5, 40, 33), (70, 3, 64), with_dlse=True),
    "gqa": Packed((33, 17), (40, 65), nheads=4, nheads_k=2, with_dlse=True),
    "mqa, wide heads": Packed((33, 2), (33, 2), nheads=3, nheads_k=1, headdim=72, headdim_v=40),
    "empty between": Packed((0, 9, 0, 0, 40, 0), (3, 9, 0, 5, 40, 0)),
    "queries without keys": Packed((4, 33), (0, 0)),
    "keys without queries": Packed((0, 0), (4, 33)),
    "all empty": Packed((0, 0), (0, 0)),
    "no sequences": Packed((), ()),
    "one": Packed((65,), (65,)),
    "used": Packed((40, 40, 9), (70, 33, 9), (33, 0, 9), (64, 33, 3), with_dlse=True),
    "used keys": Packed((1, 1, 1), (70, 70, 70), None, (1, 0, 64), nheads=4, nheads_k=1),
    "used queries": Packed((70, 33), (70, 33), (3, 32)),
}


@every_row
@both_causal
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_sequence_by_itself(implementation, causal, call, device):
    check(replace(call, causal=causal), implementation, device)


@every_row
@every_dtype
def test_dtypes(implementation, dtype, device):
    call = Packed((37, 64, 5), (64, 37, 5), (30, 64, 5), dtype=dtype, causal=True, with_dlse=True)
    check(call, implementation, device)


@every_row
@both_causal
def test_long_sequences(implementation, causal, device):
    lengths = tuple(n * BIG for n in (3, 70, 0, 20, 50))
    call = Packed(lengths, lengths, headdim=64, dtype=LOW_PRECISION, causal=causal)
    check(call, implementation, device)
    check(replace(call, headdim=128, nheads=4), implementation, device)


def lengths(draw, batch: int, longest: int) -> tuple[int, ...]:
    one = st.one_of(st.just(0), st.integers(0, longest))
    return tuple(draw(st.lists(one, min_size=batch, max_size=batch)))


@st.composite
def calls(draw: st.DrawFn) -> Packed:
    batch, longest = draw(st.integers(0, 4)), 700 if GPU else 70
    lengths_q, lengths_k = lengths(draw, batch, longest), lengths(draw, batch, longest)
    if draw(st.booleans()):
        lengths_k = lengths_q
    nheads_k = draw(st.integers(1, 2))

    def used(of: tuple[int, ...]) -> tuple[int, ...] | None:
        return tuple(draw(st.integers(0, n)) for n in of) if draw(st.booleans()) else None

    return Packed(
        lengths_q,
        lengths_k,
        used(lengths_q),
        used(lengths_k),
        nheads=nheads_k * draw(st.integers(1, 3)),
        nheads_k=nheads_k,
        headdim=draw(st.sampled_from([16, 64, 17, 128])),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, 0.0, -0.3])),
        with_dlse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@every_row
@settings(max_examples=15)  # a GPU compiles kernels for most of them
@given(call=calls())
@example(call=Packed((0, 33), (32, 1), (0, 32), (1, 0), causal=True, with_dlse=True))
def test_any_packed_call(implementation, call, device):
    if registry.get(implementation).headdim_multiple > 1:  # else most of them would be refused
        call = replace(call, headdim=-call.headdim // 8 * -8, dtype=LOW_PRECISION)
    check(call, implementation, device)


@every_row
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
@both_causal
def test_a_neighbour_changes_no_bit(implementation, use_tma, causal, tuned, device):
    """Sequence 1 gives the same bits whether its neighbours, used up or not, are numbers or NaN."""
    tuned.use_tma(use_tma)
    length = 33 * BIG
    call = Packed(
        (length,) * 3, (length,) * 3, (length, length - 7, length), (length, length - 9, length),
        dtype=LOW_PRECISION, headdim=64, causal=causal, with_dlse=True,
    )  # fmt: skip
    inputs = inputs_of(call, device, fill=1.0)
    same = repeatable(implementation)
    first = parts(call, run(call, inputs, implementation, **same), 1)
    rows_q, rows_k = call.rows(1)
    poisoned = [inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse.T]
    for x, rows in zip(poisoned, (rows_q, rows_k, rows_k, rows_q, rows_q), strict=True):
        x[: rows.start] = NAN
        x[rows.stop :] = NAN
    assert_bitwise_equal(first, parts(call, run(call, inputs, implementation, **same), 1))


@every_row
def test_results_do_not_depend_on_max_seqlen(implementation, device):
    call = Packed((5, 40, 0), (33, 70, 9), causal=True)
    inputs = inputs_of(call, device)
    same = repeatable(implementation)
    first = run(call, inputs, implementation, **same)
    assert_bitwise_equal(first, run(call, inputs, implementation, longer=1000, **same))
    assert_bitwise_equal(first, run(call, inputs, implementation, deterministic=True))


def test_what_is_given_chooses_the_kernel(monkeypatch, device):
    """Kernels are compiled for whether seqused is there; prepared launches must not be mixed up."""
    launches = []
    plain = Launch.__call__

    def record(self, *tensors, **options):
        launches.append(self)
        return plain(self, *tensors, **options)

    monkeypatch.setattr(Launch, "__call__", record)
    lengths = (5, 33)
    seen = []
    for used_q, used_k in ((None, None), (lengths, None), (None, lengths), (lengths, lengths)):
        call = Packed(lengths, lengths, used_q, used_k, dtype=LOW_PRECISION)
        check(call, "v2", device)
        check(call, "v2", device)  # by the prepared launch
        assert not set(launches) & set(seen)
        seen += launches
        launches.clear()


@every_row
def test_the_order_of_sequences_does_not_matter(implementation, device):
    """Each gives the bits that it gives anywhere."""
    lengths = tuple(n * BIG for n in (3, 40, 0, 70, 33))
    call = Packed(lengths, lengths, dtype=LOW_PRECISION, causal=True)
    inputs = inputs_of(call, device)
    same = repeatable(implementation)
    results = run(call, inputs, implementation, **same)
    backwards = Packed(lengths[::-1], lengths[::-1], dtype=LOW_PRECISION, causal=True)
    rows = [call.rows(i)[0] for i in reversed(range(len(lengths)))]
    turned = Inputs(
        *(torch.cat([x[r] for r in rows]) for x in list(vars(inputs).values())[:4]), None
    )
    again = run(backwards, turned, implementation, **same)
    for i in range(len(lengths)):
        assert_bitwise_equal(parts(call, results, i), parts(backwards, again, len(lengths) - 1 - i))


@every_row
def test_strided_inputs(implementation, device):
    """Slices of one tensor, with other rows and heads around them."""
    call = Packed((33, 5), (33, 5), headdim=16, causal=True)
    inputs = inputs_of(call, device)
    around = torch.full((40, 3, 4, 24), NAN, dtype=call.dtype, device=device)
    views = []
    for i, x in enumerate((inputs.q, inputs.k, inputs.v)):
        view = around[1:39, i, 1:3, 8:24]
        views.append(view.copy_(x))
    strided = Inputs(*views, inputs.dout, None)
    same = repeatable(implementation)
    assert_bitwise_equal(
        run(call, inputs, implementation, **same), run(call, strided, implementation, **same)
    )


FEATURES = {
    "window": {"window_size": (7, 3)},
    "left window, causal": {"window_size": (9, -1), "causal": True},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": (2,)},
    "alibi by batch entry": {"alibi_slopes": (3, 2), "causal": True, "softcap": 2.0},
}


@every_row
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features_are_those_of_the_sequence(implementation, features, device):
    """Windows, slopes and distances count within a sequence, and b is its number."""
    call = Packed((33, 0, 40), (40, 5, 33), (33, 0, 35), dtype=torch.float32)
    inputs = inputs_of(call, device)
    options = dict(features)
    if "alibi_slopes" in options:
        n = torch.Size(options["alibi_slopes"]).numel()
        slopes = 2.0 ** -torch.arange(1, n + 1, device=device).float()
        options["alibi_slopes"] = slopes.view(options["alibi_slopes"])
    try:
        call = replace(call, causal=options.pop("causal", False))
        results = run(call, inputs, implementation, **options)
    except NotImplementedError as error:
        pytest.skip(str(error))
    for i in range(len(call.lengths_q)):
        rows_q, rows_k = call.rows(i)
        alone = dict(options)
        if features.get("alibi_slopes") == (3, 2):
            alone["alibi_slopes"] = options["alibi_slopes"][i]
        leaves = [
            x[None, rows].detach().double().requires_grad_()
            for x, rows in ((inputs.q, rows_q), (inputs.k, rows_k), (inputs.v, rows_k))
        ]
        out, lse = attention(
            *leaves, causal=call.causal, return_lse=True, implementation="reference", **alone
        )
        grads = torch.autograd.grad(out, leaves, inputs.dout[None, rows_q].double())
        expected = dict(zip(("dq", "dk", "dv"), grads, strict=True), out=out, lse=lse)
        for name, x in parts(call, results, i).items():
            torch.testing.assert_close(x.double(), expected[name], rtol=1e-4, atol=1e-4)


@every_row
@both_causal
def test_sinks(implementation, causal, device):
    """Each sequence has them, and their gradient is the sum; rows without part have none."""
    call = Packed(
        (33, 0, 40, 9), (40, 5, 33, 0), (33, 0, 35, 9), nheads=4, nheads_k=2, causal=causal,
        with_dlse=True, dtype=torch.float32,
    )  # fmt: skip
    inputs = inputs_of(call, device)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 5.0], device=device, requires_grad=True)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)] + [sinks]
    cu_seqlens = (int32(starts, device) for starts in call.starts())
    with testing.poisoned():
        try:
            out, lse, _ = flash_attn_varlen_func(
                *leaves[:3], *cu_seqlens, 40, 40, causal=causal, return_attn_probs=True,
                seqused_q=int32(call.used_q, device), sinks=sinks, implementation=implementation,
            )  # fmt: skip
        except NotImplementedError as error:
            pytest.skip(str(error))
        grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    unused_q, _ = unused(call, device)
    assert not out[unused_q].any()
    assert (lse[:, unused_q] == float("-inf")).all()
    names = ("dq", "dk", "dv", "dsinks")
    results = dict(zip(names, grads, strict=True), out=out, lse=lse)
    dsinks = torch.zeros_like(sinks, dtype=torch.float64)
    for i in range(len(call.lengths_q)):
        rows_q, rows_k = call.rows(i)
        alone = [
            x.detach().double().requires_grad_()
            for x in (inputs.q[None, rows_q], inputs.k[None, rows_k], inputs.v[None, rows_k], sinks)
        ]
        out, lse = attention(
            *alone[:3], causal=causal, sinks=alone[3], return_lse=True, implementation="reference"
        )
        arriving = (inputs.dout[None, rows_q].double(), inputs.dlse[None, :, rows_q].double())
        *grads, dsinks_i = torch.autograd.grad((out, lse), alone, arriving)
        dsinks += dsinks_i
        expected = dict(zip(names, grads, strict=False), out=out, lse=lse)
        for name, x in parts(call, results, i).items():
            torch.testing.assert_close(x.double(), expected[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results["dsinks"].double(), dsinks, rtol=1e-4, atol=1e-4)


@every_row
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(implementation, dynamic, device):
    """One graph, the same bits as without, and with dynamic shapes for any lengths."""
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("inductor" if GPU else "aot_eager")

    options = {"causal": True, "return_attn_probs": True, "implementation": implementation}
    options |= repeatable(implementation)

    def call(*arguments):
        q, *rest = arguments
        out, lse, _ = flash_attn_varlen_func(q * 1, *rest, **options)
        return out + 0, lse

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for lengths in ((5, 33, 0), (40, 2, 9)) if dynamic else ((5, 33, 0),):
        packed = Packed(lengths, lengths, dtype=LOW_PRECISION, with_dlse=True)
        if reason := refusal(packed, implementation, device):
            pytest.skip(reason)
        inputs = inputs_of(packed, device)
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        cu_seqlens = int32(packed.starts()[0], device)
        arguments = (*leaves, cu_seqlens, cu_seqlens, max(lengths), max(lengths))
        results = []
        for function in (call, compiled):
            outputs = function(*arguments)
            grads = torch.autograd.grad(outputs, leaves, (inputs.dout, inputs.dlse))
            results.append(
                dict(zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *grads), strict=True))
            )
        assert_bitwise_equal(*results)
    assert backend.frame_count <= (2 if dynamic else 1)


class Seen(torch.Tensor):
    """Sees which functions are called with it."""

    functions: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_see_the_operator(device):
    """Also one that says where the sequences are: only plain tensors may do without it."""
    q = torch.randn(8, 2, 16, device=device)
    cu_seqlens = int32((0, 5, 8), device)
    expected = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 5, 5)
    got = flash_attn_varlen_func(q, q, q, cu_seqlens.as_subclass(Seen), cu_seqlens, 5, 5)
    assert torch.ops.triflash.packed_attention_forward.default in Seen.functions
    assert_bitwise_equal({"out": expected}, {"out": got.as_subclass(torch.Tensor)})


def test_autocast_and_second_derivatives(device):
    call = Packed((5, 33), (5, 33), headdim=16, dtype=torch.float32)
    inputs = inputs_of(call, device)
    q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    cu_seqlens = int32(call.starts()[0], device)
    arguments = (q, k, v, cu_seqlens, cu_seqlens, 33, 33)
    with torch.autocast(device.type, torch.bfloat16):
        out = flash_attn_varlen_func(*arguments)
    assert out.dtype == torch.bfloat16
    (dq,) = torch.autograd.grad(out.float().sum(), q)
    assert dq.dtype == torch.float32
    out = flash_attn_varlen_func(*arguments)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu(device):
    """With the check of values, which a GPU makes by itself, and a first call behind."""
    lengths = (5, 33, 700, 0)
    call = Packed(lengths, lengths, lengths, lengths, dtype=LOW_PRECISION)
    inputs = inputs_of(call, device)
    run(call, inputs, "v2")
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    cu_seqlens, used = int32(call.starts()[0], device), int32(lengths, device)
    with without_waiting():
        out = flash_attn_varlen_func(
            *leaves, cu_seqlens, cu_seqlens, 700, 700, seqused_q=used, seqused_k=used
        )
        out.backward(inputs.dout)


@pytest.mark.gpu
def test_cuda_graph(device):
    """A captured call takes the lengths that cu_seqlens has when it is replayed."""
    call = Packed((300, 5, 33), (300, 5, 33), dtype=LOW_PRECISION, causal=True)
    inputs = inputs_of(call, device)
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    cu_seqlens = int32(call.starts()[0], device)

    def both():
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 338, 338, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), inputs.dout)

    graph, results = captured(both)
    for starts in ((0, 300, 305, 338), (0, 1, 1, 338), (0, 100, 337, 338)):
        cu_seqlens.copy_(int32(starts, device))
        graph.replay()
        got = [x.clone() for x in results]
        for a, b in zip(got, both(), strict=True):
            assert_bitwise_equal({"": a}, {"": b})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("values", "replayed"),
    [*((x, False) for x in ((0, 9, 8), (0, 5, 7), (1, 5, 8), (0, 5, 2**30))), ((0, 9, 8), True)],
)
def test_wrong_values_on_a_gpu(values, replayed):
    """They are no silent result: the next call that waits for the GPU raises. A graph looks at the
    values of each replay, though the tensor passed before."""
    in_a_new_process(_wrong_values, values, replayed)  # which can use the GPU no more


def _wrong_values(values: tuple[int, ...], replayed: bool) -> None:
    q = torch.randn(8, 2, 16, device="cuda", dtype=torch.float16)
    cu_seqlens = int32((0, 5, 8) if replayed else values, "cuda")

    def call() -> torch.Tensor:
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 8, 8)

    def finish(work: Callable[[], object]) -> None:
        work()
        torch.cuda.synchronize()

    if replayed:
        graph, _ = captured(call)
        finish(graph.replay)
        cu_seqlens.copy_(int32(values, "cuda"))
    with pytest.raises(RuntimeError, match="assert"):
        finish(graph.replay if replayed else call)


def test_what_is_captured_is_checked_in_every_call(monkeypatch, device):
    checked = []
    plain = sequences._check_cu_seqlens
    monkeypatch.setattr(
        sequences,
        "_check_cu_seqlens",
        lambda side, *rest: (checked.append(side), plain(side, *rest)),
    )
    q = torch.randn(8, 2, 16, device=device, dtype=LOW_PRECISION)
    cu_seqlens_q, cu_seqlens_k = (int32((0, 5, 8), device) for _ in range(2))

    def call() -> list[str]:
        checked.clear()
        flash_attn_varlen_func(
            q, q, q, cu_seqlens_q, cu_seqlens_k, 8, 8, implementation="reference"
        )
        return list(checked)

    assert call() == ["q", "k"]
    assert call() == []
    monkeypatch.setattr(sequences, "_capturing", lambda tensor: True)
    assert call() == call() == ["q", "k"]
    cu_seqlens_q.add_(0)
    assert call() == ["q", "k"]
    monkeypatch.setattr(sequences, "_capturing", lambda tensor: False)
    assert call() == ["q"]  # which was captured and did not run


def test_new_totals_prepare_nothing(device):
    """Steps of who packs what comes differ in their totals: launches and specs are made once."""
    from triflash.kernels.v2 import backward, forward

    caches = (forward._prepare, backward._prepare, spec._validate_varlen, registry.resolve)

    def misses(lengths_q, lengths_k) -> list[int]:
        before = [cache.cache_info().misses for cache in caches]
        call = Packed(lengths_q, lengths_k, dtype=LOW_PRECISION, causal=True)
        run(call, inputs_of(call, device), "v2")
        return [cache.cache_info().misses - n for cache, n in zip(caches, before, strict=True)]

    forget_prepared_launches()
    assert misses((64, 26), (39, 64))[:2] == [1, 1]
    assert misses((36, 64), (64, 50)) == [0, 0, 0, 0]
    assert misses((64, 64), (64, 50))[:2] == [1, 1]  # twice as many rows may want other tiles


@pytest.mark.gpu
@pytest.mark.parametrize("values", [(0, 900, 8), (0, 5, 2**30), (-(2**30), 5, 8)], ids=str)
def test_kernels_stay_inside_whatever_cu_seqlens_says(values, monkeypatch, device):
    """Without the check: an access that followed these values would be gigabytes away, and fail."""
    monkeypatch.setattr(ops, "check_sequences", lambda *_: None)
    cu_seqlens = int32(values, device)
    q, k, v = torch.randn(3, 8, 2, 64, device=device, dtype=LOW_PRECISION).unbind(0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for longest in (8, 4096):
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    torch.cuda.synchronize()


@pytest.mark.parametrize("one", [False, True], ids=["two tensors", "one tensor"])
def test_assertions_on_a_device_say_the_names_that_callers_know(one, monkeypatch):
    """On the meta device, which has no values either. Functions of packed qkv give one tensor."""
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, message: said.append(message))
    q = torch.empty(8, 2, 16, device="meta")
    cu_seqlens_q, other = (torch.empty(3, dtype=torch.int32, device="meta") for _ in range(2))
    where = Sequences(cu_seqlens_q, cu_seqlens_q if one else other)
    options = (None, False, False, False)
    call = make_varlen_spec(q, q, q, where, 5, 5, *options)
    sequences.check_sequences(call, where, where.totals(q, q))
    words = "triflash: {} must rise from 0 to 8, the rows of {}, by at most {}"
    assert said == (
        [words.format("cu_seqlens", "q", "max_seqlen")]
        if one
        else [words.format(f"cu_seqlens_{x}", x, f"max_seqlen_{x}") for x in "qk"]
    )


def cpu_arguments(**changes):
    arguments = {
        "q": torch.randn(8, 2, 16), "k": torch.randn(6, 2, 16), "v": torch.randn(6, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 5, 8], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 2, 6], dtype=torch.int32),
        "max_seqlen_q": 5, "max_seqlen_k": 4,
    }  # fmt: skip
    return arguments | changes


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = {
    "q's rank": ({"q": torch.randn(1, 8, 2, 16)}, ValueError, r"q must have 3 dimensions \(total"),
    "v's rows": ({"v": torch.randn(5, 2, 16)}, ValueError, "v must have k's 6 rows, got 5"),
    "k's heads": ({"k": torch.randn(6, 1, 16)}, ValueError, "v must have k's nheads 1, got 2"),
    "k's dtype": ({"k": torch.randn(6, 2, 16).half()}, TypeError, "k must have q's dtype"),
    "a list": ({"cu_seqlens_q": [0, 5, 8]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got"),
    "no rows": ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    "no cu_seqlens": ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be a torch.Tensor"),
    "int64": (
        {"cu_seqlens_k": ints(0, 2, 6, dtype=torch.int64)},
        TypeError, "cu_seqlens_k must be int32, got torch.int64",
    ),
    "another device": (
        {"cu_seqlens_q": torch.empty(3, dtype=torch.int32, device="meta")},
        ValueError, "cu_seqlens_q must be on q's device cpu, got meta",
    ),
    "two dimensions": (
        {"cu_seqlens_q": ints([0, 5, 8])}, ValueError, "cu_seqlens_q must have 1 dimension",
    ),
    "not contiguous": (
        {"cu_seqlens_q": ints(0, 1, 5, 6, 8, 9)[::2]}, ValueError, "cu_seqlens_q must be contig",
    ),
    "nothing": ({"cu_seqlens_q": ints()}, ValueError, r"must have batch \+ 1 entries, got none"),
    "another batch": (
        {"cu_seqlens_k": ints(0, 6)}, ValueError, "cu_seqlens_k must have cu_seqlens_q's 3 entries",
    ),
    "begin": ({"cu_seqlens_q": ints(1, 5, 8)}, ValueError, "cu_seqlens_q must begin with 0, got 1"),
    "order": (
        {"cu_seqlens_q": ints(0, 9, 8)}, ValueError,
        "cu_seqlens_q must not decrease, got 8 after 9 at index 2",
    ),
    "end": (
        {"cu_seqlens_k": ints(0, 2, 5)}, ValueError,
        "cu_seqlens_k must end with the 6 rows of k, got 5",
    ),
    "past the end": (
        {"cu_seqlens_k": ints(0, 2, 7)}, ValueError,
        "cu_seqlens_k must end with the 6 rows of k, got 7",
    ),
    "short max_seqlen": (
        {"max_seqlen_q": 4}, ValueError,
        "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 5 rows, got 4",
    ),
    "max_seqlen of a tensor": (
        {"max_seqlen_k": torch.tensor(4)}, TypeError, "max_seqlen_k must be an int, got Tensor",
    ),
    "negative max_seqlen": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0"),
    "seqused's dtype": (
        {"seqused_k": ints(1, 1, dtype=torch.int64)}, TypeError, "seqused_k must be int32",
    ),
    "seqused's batch": (
        {"seqused_q": ints(1, 1, 1)}, ValueError, "seqused_q must have batch = 2 entries, got 3",
    ),
    "seqused": (
        {"seqused_k": ints(2, 5)}, ValueError,
        "seqused_k must be from 0 to the sequence's length 4, got 5 at index 1",
    ),
    "negative seqused": (
        {"seqused_q": ints(-1, 3)}, ValueError,
        "seqused_q must be from 0 to the sequence's length 5, got -1 at index 0",
    ),
    "pages": ({"block_table": ints([0])}, NotImplementedError, "block_table"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**cpu_arguments(**changes), implementation="reference")


def test_changed_in_place(device):
    """A check that a tensor passed does not count for what is written into it later."""
    if device.type != "cpu":
        pytest.skip("on a GPU it would end the process")
    arguments = cpu_arguments()
    flash_attn_varlen_func(**arguments)
    arguments["cu_seqlens_q"][1] = 9
    with pytest.raises(ValueError, match="must not decrease"):
        flash_attn_varlen_func(**arguments)


def test_signature_of_flash_attn():
    """flash-attn 2.8's parameters, order and defaults; ours come behind, by keyword."""
    parameters = inspect.signature(flash_attn_varlen_func).parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional[7:]] == [
        ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)),
        ("softcap", 0.0), ("alibi_slopes", None), ("deterministic", False),
        ("return_attn_probs", False), ("block_table", None),
    ]  # fmt: skip
    assert [p.name for p in positional[:7]] == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    ]  # fmt: skip


def test_rows_without_packed_sequences_say_so(device):
    others = [row.name for row in registry.IMPLEMENTATIONS if row.name not in ROWS]
    assert others
    arguments = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x
        for name, x in cpu_arguments().items()
    }
    for name in others:
        with pytest.raises(NotImplementedError, match=name):
            flash_attn_varlen_func(**arguments, implementation=name)
