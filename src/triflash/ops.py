"""torch.library operators: what torch.compile, export, autocast and the dispatcher see.

An operator takes plain numbers, so that it can stand in a graph; it rebuilds the spec from its
tensors and calls the registry's row. Autograd is above these operators, in `interface._Attention`
and `packed._PackedAttention`. Eager calls may run an operator's body without it, see `is_eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from triflash import registry
from triflash.sequences import check_sequences
from triflash.spec import (
    NOT_PACKED,
    AttentionSpec,
    Sequences,
    features_of_text,
    make_spec,
    make_varlen_spec,
)
from triflash.target import target_of

Tensor = torch.Tensor

_library = torch.library.Library("triflash", "DEF")
# extras are the tensors of the features whose `text` is given, in the order of their `names`.
_OPTIONS = (
    "float softmax_scale, bool causal, bool deterministic, bool allow_tf32, str implementation, "
    'str features="", Tensor[]? extras=None'
)
_library.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor[])"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, Tensor[] saved, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor[])"
)

# One tensor for qkv, two for q and kv, three for q, k and v; padded without cu_seqlens_q.
_PACKED = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    f"SymInt max_seqlen_q, SymInt max_seqlen_k, {_OPTIONS}"
)
_library.define(
    f"packed_attention_forward(Tensor[] tensors, {_PACKED}) -> (Tensor, Tensor, Tensor[])"
)
_library.define(
    "packed_attention_backward(Tensor dout, Tensor? dlse, Tensor[] tensors, Tensor out, "
    f"Tensor lse, Tensor[] saved, {_PACKED}) -> (Tensor[], Tensor[])"
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    implementation: str,
    features: str = "",
    extras: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec = _spec(q, k, v, softmax_scale, causal, deterministic, allow_tf32, features, extras)
    row = registry.resolve(implementation, spec, target_of(q.device))
    return run_forward(q, k, v, spec, row, extras)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    row: registry.Implementation,
    extras: Sequence[Tensor] | None = None,
    sequences: Sequences = NOT_PACKED,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The body of both forward operators, which may be called without them if `is_eager`."""
    with _on_device_of(q):
        if spec.varlen is not None:
            check_sequences(spec, sequences, sequences.totals(q, k))
        return row.load_forward()(q, k, v, spec, *_given(extras), **_where(sequences))


_PLAIN_TYPES = Tensor, torch.nn.Parameter


def is_eager(*tensors: Tensor, optional: Sequence[Tensor | None] = ()) -> bool:
    """Nobody would see or change a call of an operator: no compiler, mode, profiler or subclass.

    Then its body does as well, and dispatching and validating again need not be paid for. Only
    what is optional may be None: a None for q is no tensor yet, and validation has to say so, as it
    has to of sparse tensors.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in (*tensors, *[t for t in optional if t is not None]):
        if not (
            type(tensor) in _PLAIN_TYPES
            and (tensor.is_cuda or tensor.is_cpu)
            and tensor.layout is torch.strided
            and not tensor.is_neg()  # as complex.conj().imag is; an operator gets it in order
        ):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    implementation: str,
    features: str = "",
    extras: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The body of the backward operator, which may be called without it if `is_eager`."""
    spec = _spec(q, k, v, softmax_scale, causal, deterministic, allow_tf32, features, extras)
    row = registry.resolve(implementation, spec, target_of(q.device))
    dout, dlse = _readable(dout, dlse)
    with _on_device_of(q):
        dq, dk, dv, *dextras = row.load_backward()(
            dout, dlse, q, k, v, out, lse, saved, spec, *_given(extras)
        )
    return dq, dk, dv, dextras


def _readable(dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients arrive as autograd made them: out.sum() expands a scalar, all strides 0."""
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()


def aligned_bases(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    features: str,
    extras: Sequence[Tensor] | None,
) -> AttentionSpec:
    bases = aligned_bases(q, k, v)
    return make_spec(
        q, k, v, softmax_scale, causal, deterministic, allow_tf32, bases,
        features_of_text(features), extras or (),
    )  # fmt: skip


def _packed_forward(tensors: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    q, k, v = split(tensors)
    spec, sequences, extras = _packed_spec(q, k, v, *options)
    row = registry.resolve(options[_IMPLEMENTATION], spec, target_of(q.device))
    return run_forward(q, k, v, spec, row, extras, sequences)


def _where(sequences: Sequences) -> dict[str, Sequences]:
    """The keyword of a row's functions that says where packed sequences are."""
    return {} if sequences is NOT_PACKED else {"sequences": sequences}


def packed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    tensors: list[Tensor],
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    *options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The body of the packed backward operator, as `backward`."""
    q, k, v = split(tensors)
    spec, sequences, extras = _packed_spec(q, k, v, *options)
    row = registry.resolve(options[_IMPLEMENTATION], spec, target_of(q.device))
    dout, dlse = _readable(dout, dlse)
    arguments = (dout, dlse, q, k, v, out, lse, saved, spec, *_given(extras))
    gradients = [t.new_empty(t.shape) for t in tensors]
    parts = split(gradients)
    with _on_device_of(q):
        where = _where(sequences)
        if row.writes_gradients:
            _, _, _, *dextras = row.load_backward()(*arguments, **where, grads=parts)
        else:
            dq, dk, dv, *dextras = row.load_backward()(*arguments, **where)
            for part, grad in zip(parts, (dq, dk, dv), strict=True):
                part.copy_(grad)
    return gradients, dextras


def split(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, of which the last two or all three are one tensor, stacked before its heads."""
    *apart, last = tensors
    q, k, v = tensors if len(tensors) == 3 else (*apart, *last.unbind(-3))
    return q, k, v


_IMPLEMENTATION = 10  # in the options of the packed operators


def _packed_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    implementation: str,
    features: str = "",
    extras: Sequence[Tensor] | None = None,
) -> tuple[AttentionSpec, Sequences, Sequence[Tensor] | None]:
    """The spec, where sequences are, and the extras, of the options of a packed operator."""
    if cu_seqlens_q is None:
        options = (softmax_scale, causal, deterministic, allow_tf32, features, extras)
        return _spec(q, k, v, *options), NOT_PACKED, extras
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    spec = make_varlen_spec(
        q, k, v, sequences, max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic,
        allow_tf32, aligned_bases(q, k, v), features_of_text(features), extras or (),
    )  # fmt: skip
    return spec, sequences, extras


def _given(extras: Sequence[Tensor] | None) -> tuple[tuple[Tensor, ...], ...]:
    """The last argument of a row's functions; rows without features need not know of it."""
    return (tuple(extras),) if extras else ()


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels launch on the current device, which need not be the tensors'."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


for _key in ("CPU", "CUDA"):
    _library.impl("attention_forward", _forward, _key)
    _library.impl("attention_backward", backward, _key)
    _library.impl("packed_attention_forward", _packed_forward, _key)
    _library.impl("packed_attention_backward", packed_backward, _key)


def _fake_forward(q: Tensor, v: Tensor, implementation: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Empty results of padded or packed tensors."""
    *rows, nheads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(*rows, nheads, v.shape[-1])
    lse = q.new_empty(*rows[:-1], nheads, rows[-1], dtype=lse_dtype)
    saves = () if implementation == "auto" else registry.get(implementation).saves
    return out, lse, [torch.empty_like(lse) for _ in saves]


@torch.library.register_fake("triflash::attention_forward", lib=_library)
def _(q, k, v, softmax_scale, causal, deterministic, allow_tf32, implementation, *_):  # type: ignore[no-untyped-def]
    return _fake_forward(q, v, implementation)


@torch.library.register_fake("triflash::attention_backward", lib=_library)
def _(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, out, lse, saved, softmax_scale, causal, deterministic, allow_tf32,
    implementation, features="", extras=None,
):  # fmt: skip
    wanted = features_of_text(features).gradients_of(extras or ())
    dq, dk, dv, *dextras = (t.new_empty(t.shape) for t in (q, k, v, *wanted))
    return dq, dk, dv, dextras


@torch.library.register_fake("triflash::packed_attention_forward", lib=_library)
def _(tensors, *options):  # type: ignore[no-untyped-def]
    q, _, v = split(tensors)
    return _fake_forward(q, v, options[_IMPLEMENTATION])


@torch.library.register_fake("triflash::packed_attention_backward", lib=_library)
def _(dout, dlse, tensors, out, lse, saved, *options):  # type: ignore[no-untyped-def]
    features, extras = (*options[_IMPLEMENTATION + 1 :], "", None)[:2]
    wanted = features_of_text(features).gradients_of(extras or ())
    return [t.new_empty(t.shape) for t in tensors], [t.new_empty(t.shape) for t in wanted]


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device; asking for "meta", which has none, raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, as it casts those of other attention operators.

    What is no tensor, of which nothing is known before validation, stays for that to name.
    """
    dtype = torch.get_autocast_dtype(tensors[0].device.type)

    def casts(t: object) -> bool:
        return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64

    return tuple(t.to(dtype) if casts(t) else t for t in tensors)


def _autocast(device_type: str) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    def forward(q: Tensor, k: Tensor, v: Tensor, *options: object):  # type: ignore[no-untyped-def]
        q, k, v = cast_for_autocast(q, k, v)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.triflash.attention_forward(q, k, v, *options)

    return forward


def _packed_autocast(device_type: str) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    def forward(tensors: list[Tensor], *options: object):  # type: ignore[no-untyped-def]
        tensors = list(cast_for_autocast(*tensors))
        with torch.autocast(device_type, enabled=False):
            return torch.ops.triflash.packed_attention_forward(tensors, *options)

    return forward


for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("attention_forward", _autocast(_type), _key)
    _library.impl("packed_attention_forward", _packed_autocast(_type), _key)
