"""Inputs, a baseline and the error budget, shared by tests, `triflash check` and benchmarks.

The rule is that of PyTorch's and flash-attn's own tests: against a float64 oracle on the same
inputs, out may have at most twice and a gradient at most three times the error of plain PyTorch
attention in the same precision. Nothing is compared with a fixed tolerance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from triflash import mods, reference, registry
from triflash.block_mask import create_block_mask
from triflash.interface import attention
from triflash.spec import AttentionSpec, make_spec
from triflash.target import target_of

Tensor = torch.Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "junk_strides")

# How many times the baseline's error a tensor may have.
FACTORS = {"out": 2.0, "lse": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
# How much of float32_noise comes on top. It is one standard deviation of exact float32 arithmetic;
# a GPU's exp2 is off by up to two units more, and its tensor cores truncate partial sums.
NOISE_FACTOR = 8.0
_SAMPLE = 2048  # elements whose largest error is a fair estimate


@dataclass(frozen=True)
class Case:
    """One attention call: shapes `(batch, seqlen, nheads, headdim)`, options, and a seed.

    Attributes:
        headdim_v: None for headdim.
        softmax_scale: None for headdim ** -0.5.
        with_dlse: lse has a gradient too.
        layout: one of LAYOUTS, how q, k, v and dout lie in memory (see `laid_out`).
        window_size: `(left, right)`, None for unbounded.
        softcap: 0 for none.
        alibi: "heads" or "batch and heads", what slopes there are, or "".
        score_mod, mask_mod: from `triflash.mods`, with a reference.
        make_aux: `(case, device) -> aux`. Tensors in it that require gradients have them checked.
        block_size: of a block mask of causal, window_size and mask_mod, or None for no such thing.
        block_heads: the block mask is one for each batch entry and head.
        sinks: there are some, learnable, of this dtype; None for none.
        bias: which of batch, nheads, seqlen_q and seqlen_k a learnable bias has, say "hqk"; the
            others are 1. "" for none. "-" makes it hide keys, "expanded" and "float32" say what
            else it is beside contiguous and of q's dtype.
        dropout_p: by the seed of the case.
    """

    batch: int = 2
    seqlen_q: int = 128
    seqlen_k: int = 128
    nheads: int = 2
    nheads_k: int = 2
    headdim: int = 64
    headdim_v: int | None = None
    dtype: torch.dtype = torch.float16
    causal: bool = False
    softmax_scale: float | None = None
    allow_tf32: bool = False
    with_dlse: bool = False
    layout: str = "contiguous"
    seed: int = 0
    window_size: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi: str = ""
    score_mod: mods.ScoreMod | None = None
    mask_mod: mods.MaskMod | None = None
    make_aux: Callable[[Case, torch.device], tuple[Any, ...]] | None = None
    block_size: tuple[int, int] | None = None
    block_heads: bool = False
    sinks: torch.dtype | None = None
    bias: str = ""
    dropout_p: float = 0.0

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of q, k, v and out."""
        headdim_v = self.headdim if self.headdim_v is None else self.headdim_v
        return (
            (self.batch, self.seqlen_q, self.nheads, self.headdim),
            (self.batch, self.seqlen_k, self.nheads_k, self.headdim),
            (self.batch, self.seqlen_k, self.nheads_k, headdim_v),
            (self.batch, self.seqlen_q, self.nheads, headdim_v),
        )

    def spec(self) -> AttentionSpec:
        """The validated spec; raises what a call with such inputs would raise."""
        device = torch.device("meta")
        q, k, v, _ = (
            laid_out(torch.empty(s, dtype=self.dtype, device=device), self.layout)
            for s in self.shapes()
        )
        return self.spec_of(q, k, v, self.extras(device))

    def spec_of(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]) -> AttentionSpec:
        """The validated spec of a call with these tensors."""
        features, tensors = mods.features_of(**extras)
        features = replace(features, with_grad=mods.differentiable(features, tensors))
        return make_spec(
            q, k, v, self.softmax_scale, self.causal, False, self.allow_tf32, True, features,
            tensors,
        )  # fmt: skip

    def extras(self, device: torch.device) -> dict[str, Any]:
        """The features of the call as arguments of `attention`, with fresh tensors."""
        slopes = None
        if self.alibi:
            shape = (self.batch, self.nheads) if "batch" in self.alibi else (self.nheads,)
            n = torch.arange(1, math.prod(shape) + 1, dtype=torch.float32, device=device)
            slopes = (2.0 ** (-n / 2)).view(shape)
        sinks = None
        if self.sinks is not None:  # some smaller than most scores, some larger
            sinks = torch.arange(self.nheads, device=device, dtype=self.sinks) * 3.0 - 1.0
            sinks.requires_grad_()
        aux = () if self.make_aux is None else self.make_aux(self, device)
        scores = {
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            "score_mod": self.score_mod,
            "sinks": sinks,
            "bias": self._bias(device) if self.bias else None,
            "dropout_p": self.dropout_p,
            "dropout_seed": torch.tensor([self.seed + 2**40], device=device),
        }
        if self.block_size is None:
            masks = {"window_size": self.window_size, "mask_mod": self.mask_mod}
            return {**scores, **masks, "aux": aux}
        assert self.mask_mod is not None, "there is no block mask without mask_mod"
        block_mask = create_block_mask(
            self.mask_mod, self.batch if self.block_heads else None,
            self.nheads if self.block_heads else None, self.seqlen_q, self.seqlen_k,
            causal=self.causal, window_size=self.window_size, aux=aux, device=device,
            block_size=self.block_size,
        )  # fmt: skip
        return {**scores, "aux": () if self.score_mod is None else aux, "block_mask": block_mask}

    def _bias(self, device: torch.device) -> Tensor:
        which, *words = self.bias.split()
        sizes = (self.batch, self.nheads, self.seqlen_q, self.seqlen_k)
        shape = [n if name in which else 1 for name, n in zip("bhqk", sizes, strict=True)]
        values = torch.arange(math.prod(shape), device=device, dtype=torch.float32).view(shape)
        bias = 3.0 * torch.sin(1.7 * values)
        if "-" in words:
            bias = bias.masked_fill(values % 3 == 1, float("-inf"))
            if "q" in which:
                bias[..., :1, :] = float("-inf")  # a row without keys
        bias = bias.to(torch.float32 if "float32" in words else self.dtype)
        if "expanded" in words:
            bias = bias.expand(sizes)
        return bias.requires_grad_()

    def __str__(self) -> str:
        headdim = f"{self.headdim}"
        if self.headdim_v not in (None, self.headdim):
            headdim += f"/{self.headdim_v}"
        heads = f"{self.nheads}"
        if self.nheads_k != self.nheads:
            heads += f"/{self.nheads_k}"
        lengths = f"{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths += f"x{self.seqlen_k}"
        parts = [f"b{self.batch} s{lengths} h{heads} d{headdim}", _short(self.dtype)]
        if self.causal:
            parts.append("causal")
        if self.softmax_scale is not None:
            parts.append(f"scale={self.softmax_scale:g}")
        if self.allow_tf32:
            parts.append("tf32")
        if self.with_dlse:
            parts.append("dlse")
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.window_size != (None, None):
            parts.append(f"window={self.window_size[0]},{self.window_size[1]}")
        if self.softcap:
            parts.append(f"softcap={self.softcap:g}")
        if self.alibi:
            parts.append(f"alibi of {self.alibi}")
        parts += [mod.key for mod in (self.score_mod, self.mask_mod) if mod is not None]
        if self.block_size is not None:
            of = " a head" if self.block_heads else ""
            parts.append(f"blocks of {self.block_size[0]}x{self.block_size[1]}{of}")
        if self.sinks is not None:
            parts.append(f"{_short(self.sinks)} sinks")
        if self.bias:
            parts.append(f"bias {self.bias}")
        if self.dropout_p:
            parts.append(f"dropout={self.dropout_p:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class Inputs:
    """q, k, v, and the gradients that arrive: dout `(batch, seqlen_q, nheads, headdim_v)` and dlse
    `(batch, nheads, seqlen_q)` float32 or None; `extras` as `Case.extras` gives them."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, dout and dlse by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "dout": self.dout, "dlse": self.dlse}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors of extras that gradients are wanted of, by the names of `mods`."""
        features, tensors = mods.features_of(**self.extras)
        named = zip(features.names, tensors, strict=True)
        return {name: t for name, t in named if t.requires_grad}


@dataclass(frozen=True)
class Record:
    """One tensor of one call: its largest error against float64, and the largest allowed."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN, whichever of the two it is


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Fresh standard normal inputs on `device`, the same for the same seed and device."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, generator=generator, dtype=wide, device=device).to(dtype)

    q, k, v, dout = (laid_out(normal(s, case.dtype), case.layout) for s in case.shapes())
    lse_shape = (case.batch, case.nheads, case.seqlen_q)
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    dlse = normal(lse_shape, lse_dtype) if case.with_dlse else None
    return Inputs(q, k, v, dout, dlse, case.extras(device))


def laid_out(x: Tensor, layout: str, fill: float = float("nan")) -> Tensor:
    """The values of `x` `(batch, seqlen, nheads, headdim)` under other strides.

    "transposed" lies as (batch, nheads, seqlen, headdim). "sliced" is the middle of a larger tensor
    whose other elements are `fill`, every stride and the base a multiple of 16 bytes; "misaligned"
    is the same with a base and strides that are not. "junk_strides" gives every dimension of size 1
    a stride that points nowhere.
    """
    batch, seqlen, nheads, headdim = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "junk_strides":
        x = x.contiguous()
        strides = [7 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        return x.as_strided(x.shape, strides)
    if layout == "sliced":
        row, start = -(-headdim // 8) * 8 + 16, 8
    elif layout == "misaligned":
        row, start = headdim + 1 + headdim % 2, 1
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    around = x.new_full((batch + 2, seqlen + 2, nheads + 2, row), fill)
    view = around[1:-1, 1:-1, 1:-1, start : start + headdim]
    return view.copy_(x)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, `torch.empty` and its like give NaN, so that what no kernel wrote cannot look right.

    This is PyTorch's own switch, which it ties to deterministic algorithms.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    with warnings.catch_warnings():
        # With warn_only, cuBLAS in the reference would remind us of CUBLAS_WORKSPACE_CONFIG.
        warnings.filterwarnings("ignore", message=".*eterminis")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def run_case(
    case: Case, inputs: Inputs, implementation: str, backward: bool = True
) -> dict[str, Tensor]:
    """out and lse, and with `backward` the gradients, by `attention` on poisoned memory."""
    leaves = inputs.leaves
    q, k, v = (t.detach().requires_grad_(backward) for t in (inputs.q, inputs.k, inputs.v))
    with poisoned():
        out, lse = attention(
            q,
            k,
            v,
            causal=case.causal and case.block_size is None,
            softmax_scale=case.softmax_scale,
            return_lse=True,
            allow_tf32=case.allow_tf32,
            implementation=implementation,
            **inputs.extras,
        )
        results = {"out": out.detach(), "lse": lse.detach()}
        if backward:
            outputs, gradients = [out], [inputs.dout]
            if inputs.dlse is not None:
                outputs, gradients = [out, lse], [inputs.dout, inputs.dlse]
            grads = torch.autograd.grad(outputs, (q, k, v, *leaves.values()), gradients)
            results.update(zip(_names_of_gradients(leaves), grads, strict=True))
    return results


def oracle(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the inputs give in float64, by the reference."""
    extras = dict(inputs.extras)
    for name in ("sinks", "bias"):
        if extras.get(name) is not None:
            extras[name] = extras[name].detach().double().requires_grad_()
    wide = Inputs(
        inputs.q.double(),
        inputs.k.double(),
        inputs.v.double(),
        inputs.dout.double(),
        None if inputs.dlse is None else inputs.dlse.double(),
        extras,
    )
    return run_case(case, wide, "reference")


def pytorch_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Attention as one writes it in PyTorch, every step in the dtype of the inputs: out and lse.

    Rows without keys give 0 and -inf. Autograd goes through it, lse and extras included.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if spec.nheads != spec.nheads_k:
        k, v = (t.repeat_interleave(spec.group_size, dim=1) for t in (k, v))
    scores = reference.modify((q @ k.transpose(-1, -2)) * spec.softmax_scale, spec, extras)
    scores = reference.mask(scores.to(q.dtype), spec, extras)
    scores = reference.with_sinks(scores, spec, extras)
    visible = scores > float("-inf")
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    p = scores.softmax(dim=-1).masked_fill(empty, 0.0)[..., : spec.seqlen_k]
    if scores.shape[-1]:
        lse = scores.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
    else:
        lse = scores.sum(dim=-1) + float("-inf")
    p = p * reference.dropout_factor(spec, extras, q.device)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse


def baseline(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same tensors by `pytorch_attention` and autograd, in the precision of the case.

    lse is float32 whatever the inputs are, so its baseline is PyTorch in float32.
    """
    spec = case.spec()
    tensors = mods.features_of(**inputs.extras)[1]
    leaves = inputs.leaves
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    with _float32_precision("tf32" if case.allow_tf32 else "ieee"):
        out, lse = pytorch_attention(q, k, v, spec, tensors)
        outputs, gradients = [out], [inputs.dout]
        if inputs.dlse is not None:
            outputs, gradients = [out, lse], [inputs.dout, inputs.dlse.to(lse.dtype)]
        grads = torch.autograd.grad(
            outputs, (q, k, v, *leaves.values()), gradients, materialize_grads=True
        )
        if case.dtype.itemsize < 4:
            lse = pytorch_attention(q.float(), k.float(), v.float(), spec, tensors)[1]
    named = zip(_names_of_gradients(leaves), grads, strict=True)
    return {"out": out, "lse": lse, **dict(named)}


def float32_noise(case: Case, inputs: Inputs) -> dict[str, float]:
    """What float32 arithmetic inside can do to each tensor: the budget's absolute part.

    Plain PyTorch in float32 is at times exact by luck (with one key p is exp(0)) and never has the
    error of base-2 exponents, so its error alone would not be a fair budget. With u = 2^-24 (2^-11
    for tf32) a dot product is off by u times the sum of its absolute products; p carries that of
    its score, and u times lse; ds = p (dp - delta) that of p and of the two dot products; and a sum
    of terms with independent errors is off by the root of the sum of their squares. Added one after
    another, n terms round n partial sums, whose squares make n / 2 times that sum.
    """
    spec = case.spec()
    tensors = tuple(t.double() if t.is_floating_point() else t for t in _tensors(inputs))
    q, k, v, dout = (
        t.double().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    k, v = (t.repeat_interleave(spec.group_size, dim=1) for t in (k, v))
    u = 2.0**-24
    if case.allow_tf32 and case.dtype == torch.float32:
        u = 2.0**-11
    raw = ((q @ k.transpose(-1, -2)) * spec.softmax_scale).requires_grad_()
    leaves = (raw, *(t.requires_grad_() for t in spec.features.gradients_of(tensors)))
    modified = reference.modify(raw, spec, tensors)
    # A sink is a key at the end whose value is 0.
    scores = reference.mask(modified.detach(), spec, tensors)
    scores = reference.with_sinks(scores, spec, tensors).detach()
    sinks = scores.shape[-1] - spec.seqlen_k
    p = scores.softmax(dim=-1).nan_to_num(0.0)  # NaN in rows without keys
    lse = scores.logsumexp(dim=-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    products = q.abs() @ k.abs().transpose(-1, -2) * abs(spec.softmax_scale)
    # Modifications add to scores; a cap rounds like its largest value.
    products = products + (modified - raw).detach().abs().nan_to_num(posinf=0.0) + case.softcap
    products = reference.with_sinks(products, spec, tensors).detach().abs()
    score_error = u * (products + lse.abs().nan_to_num(posinf=0.0))
    p_error = p * (u + score_error)

    factor = q.new_ones(()) * reference.dropout_factor(spec, tensors, q.device)
    factor = F.pad(factor.expand(*p.shape[:-1], spec.seqlen_k), (0, sinks))
    v = F.pad(v, (0, 0, 0, sinks))
    out = (p * factor) @ v
    ds = (dout @ v.transpose(-1, -2)) * factor - (out * dout).sum(dim=-1, keepdim=True)
    products = (dout.abs() @ v.abs().transpose(-1, -2)) * factor
    products = products + (out * dout).abs().sum(dim=-1, keepdim=True)
    if inputs.dlse is not None:
        dlse = inputs.dlse.double().unsqueeze(-1)
        ds, products = ds + dlse, products + dlse.abs()
    keys, queries = (2.0**-48 * n / 2 for n in (spec.seqlen_k, spec.group_size * spec.seqlen_q))
    ds_error = p_error * ds.abs() + p * u * products
    ds = p * ds
    sink_error = ds_error[..., spec.seqlen_k :].sum(dim=(0, 2, 3))
    ds, ds_error, p, p_error = (x[..., : spec.seqlen_k] for x in (ds, ds_error, p, p_error))
    v = v[..., : spec.seqlen_k, :]
    dleaves = [
        torch.autograd.grad(modified, leaves, x, retain_graph=True, materialize_grads=True)
        for x in (ds, ds_error)
    ]
    ds, ds_error = ((d[0] * spec.softmax_scale).square() for d in dleaves)
    factor = factor[..., : spec.seqlen_k]
    p_error, p = (p_error * factor).square(), (p * factor).square()
    squares = {
        "out": (p_error + keys * p) @ v.square(),
        "lse": score_error.square(),
        "dq": (ds_error + keys * ds) @ k.square(),
        "dk": _sum_groups((ds_error + queries * ds).transpose(-1, -2) @ q.square(), spec),
        "dv": _sum_groups((p_error + queries * p).transpose(-1, -2) @ dout.square(), spec),
    }
    # Of extras every score may enter a sum: what each adds, and its rounding, in their order.
    for name, largest in zip(spec.features.with_grad, dleaves[1][1:], strict=True):
        squares["d" + name] = (sink_error if name == "sinks" else largest).square()
    return {name: _largest(t) ** 0.5 for name, t in squares.items()}


def budget(case: Case, inputs: Inputs, expected: dict[str, Tensor]) -> dict[str, float]:
    """The error that each tensor may have; `expected` is the oracle's.

    The largest error of a few elements says little of how large PyTorch's error is, so small cases
    are measured on other seeds too.
    """
    plain = baseline(case, inputs)
    errors = {name: _error(plain[name], expected[name]) for name in plain}
    fewest = min((t.numel() for t in expected.values() if t.numel()), default=_SAMPLE)
    for seed in range(case.seed + 1, case.seed + min(16, -(-_SAMPLE // fewest))):
        other = replace(case, seed=seed, layout="contiguous")
        others = make_inputs(other, inputs.q.device)
        wide = oracle(other, others)
        for name, tensor in baseline(other, others).items():
            errors[name] = max(errors[name], _error(tensor, wide[name]))
    noise = float32_noise(case, inputs)
    allowed = {
        name: FACTORS.get(name, 3.0) * errors[name] + NOISE_FACTOR * noise[name] for name in errors
    }
    allowed["lse"] += _capping_error(case, inputs)
    return allowed


def _capping_error(case: Case, inputs: Inputs) -> float:
    """What lse may be off by because v3 caps scores with one instruction, off by 2^-11 of them.

    That is what rounding them to half precision is; but lse's baseline is PyTorch in float32.
    """
    if not case.softcap or case.dtype.itemsize > 2:
        return 0.0
    q, k = (t.float().transpose(1, 2) for t in (inputs.q, inputs.k))
    k = k.repeat_interleave(case.nheads // case.nheads_k, dim=1)
    scores = (q @ k.transpose(-1, -2)).abs() * abs(case.spec().softmax_scale)
    return 2.0**-11 * case.softcap * math.tanh(_largest(scores) / case.softcap)


def check_case(case: Case, implementation: str, device: torch.device | str) -> list[Record]:
    """The errors of one implementation on one case, each with what is allowed.

    Raises:
        NotImplementedError: the implementation does not support the case; see `unsupported`.
        AssertionError: a tensor has another shape or dtype than the contract says.
    """
    inputs = make_inputs(case, device)
    row = registry.get(implementation)
    actual = run_case(case, inputs, implementation, backward=row.backward is not None)
    return compare(case, inputs, actual)


def compare(case: Case, inputs: Inputs, actual: dict[str, Tensor]) -> list[Record]:
    """Hold the tensors of `actual` (names as `run_case` gives them) against the budget."""
    expected = oracle(case, inputs)
    allowed = budget(case, inputs, expected)
    records = []
    for name, tensor in actual.items():
        wanted = torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype
        if name[1:] in inputs.leaves:
            wanted = inputs.leaves[name[1:]].dtype
        assert tensor.dtype == wanted, f"{name} is {tensor.dtype}, not {wanted}"
        assert tensor.shape == expected[name].shape, f"{name} has shape {tuple(tensor.shape)}"
        records.append(Record(name, _error(tensor, expected[name]), allowed[name]))
    return records


def unsupported(case: Case, implementation: str, device: torch.device | str) -> str | None:
    """Why `implementation` cannot run the case on `device`, as a sentence, or None if it can."""
    return registry.get(implementation).supports(case.spec(), target_of(torch.device(device)))


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in mods.features_of(**inputs.extras)[1])


def _names_of_gradients(leaves: dict[str, Tensor]) -> tuple[str, ...]:
    return ("dq", "dk", "dv", *(f"d{name}" for name in leaves))


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; NaN counts as infinite, equal infinities as none."""
    actual = actual.detach().double()
    difference = (actual - expected).abs().masked_fill(actual == expected, 0.0)
    return _largest(difference.nan_to_num(nan=float("inf"), posinf=float("inf")))


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _sum_groups(x: Tensor, spec: AttentionSpec) -> Tensor:
    """`(batch, nheads, ...)` summed over the query heads that share a key head."""
    return x.unflatten(1, (spec.nheads_k, spec.group_size)).sum(dim=2)


@contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    """PyTorch's float32 matrix products in "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(
        dtype, str(dtype).removeprefix("torch.")
    )
