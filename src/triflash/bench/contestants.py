"""Who is measured: every row of the registry, PyTorch's attentions, and the peers installed here.

A contestant that cannot run a case says why in a sentence, which becomes the record's `reason`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from triflash import mods, registry, testing
from triflash.bench import variants
from triflash.bench.variants import VariantCase
from triflash.interface import attention
from triflash.packed import flash_attn_varlen_func
from triflash.spec import Varlen
from triflash.target import target_of
from triflash.testing import Case, Inputs

Tensor = torch.Tensor


@dataclass(frozen=True)
class Bound:
    """A contestant with the tensors of one case, ready to be called.

    Attributes:
        call: attention on `leaves`, out in the contestant's own layout.
        leaves: q, k and v as it wants them, requiring gradients.
        dout: what its backward gets, in out's layout.
        heads_first: its layout is (batch, nheads, seqlen, headdim), as views of the same memory.
        packed: the batch entries that its layout (total, nheads, headdim) is packed of, or 0.
        context: what has to be on while it runs, such as a pinned backend.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    heads_first: bool = False
    packed: int = 0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def gradients(self, out: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.dout, retain_graph=retain_graph)

    def standard(self, x: Tensor) -> Tensor:
        """A result as (batch, seqlen, nheads, headdim)."""
        if self.packed:
            return x.unflatten(0, (self.packed, -1))
        return x.transpose(1, 2) if self.heads_first else x


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        label: its name in tables and pictures.
        bind: (case, inputs) -> Bound.
        missing: why it cannot run on this machine at all, None if it can.
        unsupported: (case, device) -> why it cannot run the case, None if it can.
        ours: a row of the registry.
        backward: it has one.
        quadratic: it holds all scores in memory.
        first_call_s: seconds that its first call of a case may take to compile, for the estimate.
        package: whose version goes into the record.
        has: what beside plain attention it can, of variants.NEEDS.
    """

    name: str
    label: str
    summary: str
    bind: Callable[[Case, Inputs], Bound]
    missing: Callable[[], str | None] = lambda: None
    unsupported: Callable[[Case, torch.device], str | None] = lambda case, device: None
    ours: bool = False
    backward: bool = True
    quadratic: bool = False
    first_call_s: float = 0.1
    package: str | None = None
    has: frozenset[str] = frozenset()

    def version(self) -> str | None:
        """The version of the package it comes from, None for triflash and PyTorch themselves."""
        if self.package is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _leaves(inputs: Inputs, heads_first: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    q, k, v, dout = (
        t.transpose(1, 2) if heads_first else t for t in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    return (
        (
            q.detach().requires_grad_(),
            k.detach().requires_grad_(),
            v.detach().requires_grad_(),
        ),
        dout,
    )


def _is_packed(case: Case) -> bool:
    return isinstance(case, VariantCase) and case.packed


def _bind_packed(case: Case, inputs: Inputs, function: Callable[..., Any], **options: Any) -> Bound:
    """A function with flash-attn's parameters on the documents of a case as packed sequences."""
    q, k, v, dout = (t.flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
    leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
    starts, longest = variants.cu_seqlens(case, inputs.q.device)

    def call() -> Tensor:
        out = function(*leaves, starts, starts, longest, longest, causal=case.causal, **options)
        return out[0] if isinstance(out, tuple) else out

    return Bound(call, leaves, dout, packed=case.batch)


def _row(row: registry.Implementation) -> Contestant:
    def bind(case: Case, inputs: Inputs) -> Bound:
        if _is_packed(case):
            return _bind_packed(case, inputs, flash_attn_varlen_func, implementation=row.name)
        leaves, dout = _leaves(inputs, heads_first=False)
        causal = case.causal and case.block_size is None  # a block mask has its own

        def call() -> Tensor:
            out = attention(
                *leaves,
                causal=causal,
                allow_tf32=case.allow_tf32,
                implementation=row.name,
                **inputs.extras,
            )
            assert isinstance(out, Tensor)
            return out

        return Bound(call, leaves, dout)

    def unsupported(case: Case, device: torch.device) -> str | None:
        if not _is_packed(case):
            return testing.unsupported(case, row.name, device)
        spec = replace(case, mask_mod=None, make_aux=None).spec()
        rows = case.batch * case.seqlen_q
        return row.supports(replace(spec, varlen=Varlen(rows, rows)), target_of(device))

    return Contestant(
        row.name,
        f"triflash {row.name}",
        row.summary,
        bind,
        unsupported=unsupported,
        has=frozenset(variants.NEEDS),
        ours=True,
        backward=row.backward is not None,
        quadratic=row.name == "reference",
    )


@contextmanager
def _products(case: Case) -> Iterator[None]:
    """float32 matrix products of PyTorch in what the case allows."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _bind_naive(case: Case, inputs: Inputs) -> Bound:
    if isinstance(case, VariantCase):
        masked = variants.masked(case)
        spec, extras = masked.spec(), masked.extras(inputs.q.device)
        tensors = mods.features_of(**extras)[1]
        leaves, dout = _leaves(inputs, heads_first=False)
        return Bound(lambda: testing.pytorch_attention(*leaves, spec, tensors)[0], leaves, dout)
    leaves, dout = _leaves(inputs, heads_first=True)
    spec = case.spec()
    shape = (case.seqlen_q, case.seqlen_k)
    hidden = None
    if case.causal:
        ones = torch.ones(shape, dtype=torch.bool, device=inputs.q.device)
        hidden = ones.triu(case.seqlen_k - case.seqlen_q + 1)

    def call() -> Tensor:
        q, k, v = leaves
        if spec.group_size > 1:
            k, v = (t.repeat_interleave(spec.group_size, dim=1) for t in (k, v))
        scores = (q @ k.mT) * spec.softmax_scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(dim=-1) @ v

    return Bound(call, leaves, dout, heads_first=True, context=lambda: _products(case))


def _square_or_full(name: str) -> Callable[[Case, torch.device], str | None]:
    def unsupported(case: Case, device: torch.device) -> str | None:
        if case.causal and case.seqlen_q != case.seqlen_k:
            return (
                f"{name} aligns its causal mask to the top left, so with {case.seqlen_q} queries "
                f"and {case.seqlen_k} keys it computes something else."
            )
        return None

    return unsupported


def _sdpa(name: str, label: str, backend: SDPBackend) -> Contestant:
    def bind(case: Case, inputs: Inputs) -> Bound:
        leaves, dout = _leaves(inputs, heads_first=True)
        grouped = case.nheads != case.nheads_k

        def call() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=case.causal, enable_gqa=grouped
            )

        @contextmanager
        def context() -> Iterator[None]:
            with _products(case), sdpa_kernel(backend):
                yield

        return Bound(call, leaves, dout, heads_first=True, context=context)

    return Contestant(
        name,
        label,
        f"PyTorch's scaled_dot_product_attention, {backend.name} backend only",
        bind,
        unsupported=_square_or_full("scaled_dot_product_attention"),
        quadratic=backend == SDPBackend.MATH,
    )


def _bind_flex(case: Case, inputs: Inputs) -> Bound:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A second shape would make Dynamo compile a dynamic and slower kernel.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves, dout = _leaves(inputs, heads_first=True)
    device = inputs.q.device
    score_mod, mask_mod = variants.flex_functions(case, device)
    mask = None
    if mask_mod is not None:
        sizes = (case.seqlen_q, case.seqlen_k)
        mask = create_block_mask(mask_mod, None, None, *sizes, device=device)
    grouped = case.nheads != case.nheads_k

    @contextmanager
    def context() -> Iterator[None]:
        # Its backward reuses the buffers of the forward, which forbids timing it twice.
        patched = torch._functorch.config.patch(donated_buffer=False)
        with _products(case), patched:
            yield

    def call() -> Tensor:
        return compiled(*leaves, score_mod=score_mod, block_mask=mask, enable_gqa=grouped)

    return Bound(call, leaves, dout, heads_first=True, context=context)


def _gpu_only(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it runs on a GPU, not on {device.type}."


def _imported(module: str, function: str, package: str) -> Callable[[], str | None]:
    @lru_cache(maxsize=1)  # a failed import is slow, and tried again otherwise
    def missing() -> str | None:
        try:
            getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            return f"{package} is not installed here ({error})."
        except Exception as error:  # an extension built for another PyTorch raises anything
            return f"{package} does not import here: {type(error).__name__}: {_line(error)}"
        return None

    return missing


def _dao(
    name: str,
    label: str,
    summary: str,
    module: str,
    package: str,
    backward: bool = True,
    **more: Any,
) -> Contestant:
    """The FlashAttention packages have one signature; newer ones return (out, lse)."""

    def bind(case: Case, inputs: Inputs) -> Bound:
        package = importlib.import_module(module)
        if _is_packed(case):
            return _bind_packed(case, inputs, package.flash_attn_varlen_func)
        function = package.flash_attn_func
        leaves, dout = _leaves(inputs, heads_first=False)
        options: dict[str, Any] = {}
        if case.window_size[0] is not None:
            options["window_size"] = case.window_size
        if case.softcap:
            options["softcap"] = case.softcap
        if case.alibi:
            options["alibi_slopes"] = inputs.extras["alibi_slopes"]

        def call() -> Tensor:
            out = function(*leaves, causal=case.causal, **options)
            return out[0] if isinstance(out, tuple) else out

        return Bound(call, leaves, dout)

    def unsupported(case: Case, device: torch.device) -> str | None:
        if case.dtype == torch.float32:
            return f"{label} takes float16 and bfloat16, not float32."
        return _gpu_only(case, device)

    return Contestant(
        name, label, summary, bind,
        missing=_imported(module, "flash_attn_func", package),
        unsupported=unsupported, backward=backward, package=package, **more,
    )  # fmt: skip


def _bind_xformers(case: Case, inputs: Inputs) -> Bound:
    ops = importlib.import_module("xformers.ops")
    leaves, dout = _leaves(inputs, heads_first=False)
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if case.causal else None
    return Bound(lambda: ops.memory_efficient_attention(*leaves, attn_bias=bias), leaves, dout)


def _xformers_unsupported(case: Case, device: torch.device) -> str | None:
    if case.nheads != case.nheads_k:
        return "xformers takes grouped heads in a layout of its own, which is not timed here."
    return _gpu_only(case, device)


_FA3 = frozenset({"window", "softcap", "varlen"})
CONTESTANTS: tuple[Contestant, ...] = (
    *(_row(row) for row in registry.IMPLEMENTATIONS),
    Contestant(
        "naive",
        "PyTorch, naive",
        "softmax(q k^T) v as one writes it in PyTorch, every step in the dtype of the inputs",
        _bind_naive,
        quadratic=True,
        has=frozenset(variants.NEEDS),
    ),
    _sdpa("sdpa_flash", "SDPA flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("sdpa_cudnn", "SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    _sdpa("sdpa_efficient", "SDPA efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("sdpa_math", "SDPA math", SDPBackend.MATH),
    Contestant(
        "flex",
        "FlexAttention",
        "PyTorch's flex_attention, compiled for each shape",
        _bind_flex,
        unsupported=_gpu_only,
        has=frozenset(variants.NEEDS),
        first_call_s=6.0,
    ),
    _dao(
        "fa2", "FlashAttention-2", "flash-attn 2", "flash_attn", "flash-attn",
        has=frozenset({"window", "softcap", "alibi", "varlen"}),
    ),
    _dao(
        "fa3", "FlashAttention-3", "FlashAttention-3 of the flash-attn repository, hopper/",
        "flash_attn_interface", "flash-attn-3", has=_FA3,
    ),
    _dao(
        "fa3_fwd",
        "FlashAttention-3 (fa3-fwd)", "FlashAttention-3 as the forward-only wheel fa3-fwd",
        "fa3_fwd_interface", "fa3-fwd", backward=False, has=_FA3,
    ),
    _dao(
        "fa4", "FlashAttention-4", "FlashAttention-4 in the CuTe DSL, Hopper and Blackwell",
        "flash_attn.cute", "flash-attn-4", first_call_s=1.5,
    ),
    Contestant(
        "xformers",
        "xformers",
        "xformers' memory_efficient_attention, the fastest operator it has",
        _bind_xformers,
        missing=_imported("xformers.ops", "memory_efficient_attention", "xformers"),
        unsupported=_xformers_unsupported,
        package="xformers",
    ),
)  # fmt: skip


def names() -> list[str]:
    return [contestant.name for contestant in CONTESTANTS]


def get(name: str) -> Contestant:
    """The contestant called `name`; ValueError lists the known names."""
    for contestant in CONTESTANTS:
        if contestant.name == name:
            return contestant
    raise ValueError(f"contestant must be one of {', '.join(names())}, got {name!r}")


def ours() -> list[str]:
    return [contestant.name for contestant in CONTESTANTS if contestant.ours]


def first_choice() -> list[str]:
    """Our rows that "auto" picks from on a GPU: those that are compared with the peers."""
    return [row.name for row in registry.IMPLEMENTATIONS if row.auto and row.needs_kernels]


def refusal(contestant: Contestant, case: Case, device: torch.device) -> str | None:
    """Why it cannot run the case here, None if it can as far as it says."""
    lacks = variants.lacks(case, contestant.has)
    return contestant.missing() or lacks or contestant.unsupported(case, device)


def explain(error: BaseException, heard: list[warnings.WarningMessage]) -> str:
    """One line on why a call failed; PyTorch tells in warnings why a backend declined."""
    text = f"{type(error).__name__}: {_line(error)}"
    if not any(sign in str(error) for sign in ("No available kernel", "No viable backend")):
        return text
    said = [str(w.message).partition(" (Triggered")[0].strip() for w in heard]
    useful = [s for s in said if "not used because" not in s and "runtime disabled" not in s]
    return useful[0] if useful else text


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return re.sub(r"\s+", " ", lines[0])[:300] if lines else ""


def with_head(case: Case) -> Case:
    """The case of one key head with its group of query heads, of one sequence."""
    return replace(case, batch=1, nheads=case.nheads // case.nheads_k, nheads_k=1)
