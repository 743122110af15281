"""One meaning for every argument: all validation ends here, and kernels see only the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)
SMALLEST_FLOAT32 = 2.0**-126  # that is not subnormal


# What a call can ask for beside plain attention, in words for messages.
FEATURES = {
    "window": "sliding windows (window_size)",
    "softcap": "capped scores (softcap)",
    "alibi": "ALiBi (alibi_slopes)",
    "score_mod": "score modifications (score_mod)",
    "bias": "bias tensors (bias)",
    "mask_mod": "mask modifications (mask_mod)",
    "block_mask": "block masks (block_mask)",
    "sinks": "attention sinks (sinks)",
    "dropout": "dropout (dropout_p)",
    "varlen": "packed sequences (cu_seqlens_q)",
}


@dataclass(frozen=True, eq=False)
class Mod:
    """A score or mask modification: the key under which `mods` knows it, and its aux.

    In aux a string names a tensor of the call's extras; numbers are themselves. Equal by text:
    kernels are not the same for 1 and 1.0, nor results for 0.0 and -0.0, which tuples take for one.
    """

    key: str
    aux: tuple[str | int | float, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mod) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def text(self) -> str:
        return ",".join([self.key, *map(str, self.aux)])


@dataclass(frozen=True)
class Blocks:
    """The lists of a block mask: which blocks are not empty, and which of them are full.

    Of blocks of `size_q` queries and `size_k` keys; for each of `batch` entries and `nheads` heads,
    or 1 for all. Their tensors are called BLOCK_LISTS.
    """

    size_q: int
    size_k: int
    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        return -(-self.seqlen_q // self.size_q), -(-self.seqlen_k // self.size_k)

    @property
    def text(self) -> str:
        of_all = (self.batch, self.nheads, self.seqlen_q, self.seqlen_k)  # no astuple: Dynamo
        return ",".join(map(str, (self.size_q, self.size_k, *of_all)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors called BLOCK_LISTS."""
        of_q, of_k = self.counts
        lead = (self.batch, self.nheads)
        of_keys, of_queries = (*lead, of_q, of_k), (*lead, of_k, of_q)
        return of_keys[:3], of_keys, of_queries[:3], of_queries, of_queries


# int32: how many blocks of keys a block of queries sees, and which, rising, as block * 2 + full;
# then how many blocks of queries see a block of keys, which, and each time how many of those that
# they see come before it.
BLOCK_LISTS = ("kv_counts", "kv_entries", "q_counts", "q_entries", "q_ranks")


@dataclass(frozen=True)
class Features:
    """What a call asks for beside plain attention; docs/semantics.md states what it means.

    Tensors that belong to it travel beside the spec as `extras`, in the order of `names`.

    Attributes:
        window_left: how many keys before its own position a query sees, None for all.
        window_right: how many keys after its own position, None for all; None if causal.
        score_mods: in the order in which they change the scaled score.
        mask_mod: hides keys beside causal and window.
        sinks: each head's softmax has a score more, in the last of the extras.
        with_grad: names of the extras whose gradients are wanted.
        blocks: the lists of a block mask, which is that of causal, window and mask_mod.
        dropout_p: which share of the weights is dropped, a multiple of 2^-16.
    """

    window_left: int | None = None
    window_right: int | None = None
    score_mods: tuple[Mod, ...] = ()
    mask_mod: Mod | None = None
    sinks: bool = False
    with_grad: tuple[str, ...] = ()
    blocks: Blocks | None = None
    dropout_p: float = 0  # no 0.0: Dynamo would make a symbol of it

    @property
    def mods(self) -> tuple[Mod, ...]:
        return self.score_mods if self.mask_mod is None else (*self.score_mods, self.mask_mod)

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the extras is, in order; sinks are the last."""
        names: dict[str, None] = {}
        for mod in self.mods:
            names.update((a, None) for a in mod.aux if isinstance(a, str))
        lists = () if self.blocks is None else BLOCK_LISTS
        seed = () if self.dropout_p == 0.0 else ("dropout_seed",)
        return (*names, *lists, *seed, *(("sinks",) if self.sinks else ()))

    def named(self, extras: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The extras by their names."""
        return dict(zip(self.names, extras, strict=True))

    def gradients_of(self, extras: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those of `extras` whose gradients are wanted; they are what a backward gives last."""
        return [t for name, t in self.named(extras).items() if name in self.with_grad]

    @property
    def scattered(self) -> tuple[str, ...]:
        """Of `with_grad` those whose gradients kernels add up atomically, in any order."""
        return tuple(name for name in self.with_grad if name != "sinks")

    @property
    def uses(self) -> tuple[str, ...]:
        """Which of FEATURES they are."""
        used = [] if self.window_left is None and self.window_right is None else ["window"]
        used += [m.key if m.key in FEATURES else "score_mod" for m in self.score_mods]
        used += [] if self.mask_mod is None else ["mask_mod"]
        used += [] if self.blocks is None else ["block_mask"]
        used += ["sinks"] if self.sinks else []
        return tuple(used) if self.dropout_p == 0.0 else (*used, "dropout")

    @property
    def text(self) -> str:
        """Canonical text, which `features_of_text` reads; plain attention is the empty one."""
        parts = []
        if self.window_left is not None or self.window_right is not None:
            left = "" if self.window_left is None else self.window_left
            right = "" if self.window_right is None else self.window_right
            parts.append(f"window={left},{right}")
        for mod in self.score_mods:
            parts.append("score=" + mod.text)
        if self.mask_mod is not None:
            parts.append("mask=" + self.mask_mod.text)
        if self.sinks:
            parts.append("sinks")
        if self.with_grad:
            parts.append("grad=" + ",".join(self.with_grad))
        if self.blocks is not None:
            parts.append("blocks=" + self.blocks.text)
        if self.dropout_p != 0.0:
            parts.append(f"dropout={self.dropout_p}")
        return ";".join(parts)


PLAIN = Features()


@lru_cache(maxsize=4096)
def features_of_text(text: str) -> Features:
    """The features whose `text` this is."""
    features = PLAIN
    for part in filter(None, text.split(";")):
        field, _, values = part.partition("=")
        first, *rest = values.split(",")
        if field == "window":
            left, right = (int(x) if x else None for x in (first, *rest))
            features = replace(features, window_left=left, window_right=right)
        elif field == "sinks":
            features = replace(features, sinks=True)
        elif field == "grad":
            features = replace(features, with_grad=(first, *rest))
        elif field == "blocks":
            features = replace(features, blocks=Blocks(*map(int, (first, *rest))))
        elif field == "dropout":
            features = replace(features, dropout_p=float(first))
        else:
            mod = Mod(first, tuple(map(_number_or_name, rest)))
            if field == "score":
                features = replace(features, score_mods=(*features.score_mods, mod))
            else:
                features = replace(features, mask_mod=mod)
    return features


def _number_or_name(text: str) -> str | int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class Varlen:
    """About how many rows packed q has, and packed k and v: the power of two below, or 0.

    The totals themselves belong to a call (`Sequences.totals`): who packs what comes has others in
    every step, and what is prepared for a spec should serve them all.
    """

    rows_q: int
    rows_k: int


class Sequences(NamedTuple):
    """The int32 tensors of a packed call; None in others, and where every row takes part.

    cu_seqlens_q and cu_seqlens_k `(batch + 1,)`: sequence b is rows [cu_seqlens[b],
    cu_seqlens[b + 1]). seqused_q and seqused_k `(batch,)`: how many of them take part.
    """

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None

    @property
    def given(self) -> tuple[bool, ...]:
        """Which are not None, for which kernels are compiled."""
        return tuple(tensor is not None for tensor in self)

    def totals(self, q: torch.Tensor, k: torch.Tensor) -> tuple[int | None, int | None]:
        """Rows of packed q and k, None if they are not packed."""
        return (None, None) if self.cu_seqlens_q is None else (q.shape[0], k.shape[0])


NOT_PACKED = Sequences()


@dataclass(frozen=True)
class AttentionSpec:
    """A validated attention call, without its tensors.

    Tensors are `(batch, seqlen, nheads, headdim)`; `headdim` is that of q and k, `headdim_v` that
    of v and out. docs/semantics.md states what each field means. `tma`: q, k and v lie in memory as
    TMA can read them, which is no part of the call's meaning (docs/adr/0010).

    With `varlen`, tensors are packed `(total, nheads, headdim)`: `batch` counts sequences, and
    `seqlen_q` and `seqlen_k` are the longest that may come.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    dtype: torch.dtype
    softmax_scale: float
    causal: bool = False
    deterministic: bool = False
    allow_tf32: bool = False
    tma: bool = True
    # Without a default, which Dynamo of PyTorch 2.11 could not trace.
    features: Features = field(kw_only=True)
    varlen: Varlen | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (1 without GQA)."""
        return self.nheads // self.nheads_k if self.nheads_k else 1

    @property
    def uses(self) -> tuple[str, ...]:
        """Which of FEATURES the call needs."""
        return (*self.features.uses, "varlen") if self.varlen else self.features.uses

    def lse_shape(self, q: torch.Tensor) -> tuple[int, ...]:
        """`(batch, nheads, seqlen_q)`, packed `(nheads, total_q)`."""
        *batch, seqlen_q, nheads, _ = q.shape
        return (*batch, nheads, seqlen_q)


def make_spec(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    aligned_bases: bool = True,
    features: Features = PLAIN,
    extras: Sequence[torch.Tensor] = (),
) -> AttentionSpec:
    """Validate a call by its metadata alone and give its spec.

    Args:
        aligned_bases: q, k and v start at multiples of 16 bytes. Only who has the memory, as
            operators do, can know.
        features: what the call asks for beside plain attention.
        extras: the tensors of `features.names`.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not floating point or not supported.
        ValueError: ranks, shapes, dtypes, devices or strides that do not fit together.
    """
    check_tensors(q=q, k=k, v=v)
    spec = _remembered(
        _validate,
        (
            q.shape, k.shape, v.shape,
            q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device,
            q.stride(), k.stride(), v.stride(),
            softmax_scale, causal, deterministic, allow_tf32, aligned_bases, features,
        ),
    )  # fmt: skip
    if extras or features is not PLAIN:
        _check_extras(spec, features.names, extras, q.device)
    return spec


def check_tensors(**tensors: object) -> None:
    """Raises TypeError if one of these is no tensor, or nested, sparse or else without strides."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = (
                "a nested one, whose sequences flash_attn_varlen_func takes packed"
                if tensor.is_nested
                else f"layout {tensor.layout}"
            )
            raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_flag(name: str, flag: object) -> None:
    """Raises TypeError if `flag` is not a bool, but 1, say, or a tensor."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {shown(flag)}")


def check_int(name: str, value: object, least: int) -> None:
    """Raises TypeError if `value` is not an int, ValueError if it is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def shown(value: object) -> str:
    """`value` for a message; of a tensor no values, for which it would wait."""
    return type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)


def _remembered(validate: Any, arguments: tuple[Any, ...]) -> AttentionSpec:
    """What `validate`, an `lru_cache`, gives, which cannot remember what has no hash.

    That is a list where a number belongs, which validation will name, and a symbolic size, whose
    comparisons whoever traces has to see, to guard on them.
    """
    if not torch.compiler.is_compiling():
        try:
            return validate(*arguments)
        except TypeError:  # of what is wrong, which is told below, or of what has no hash
            pass
    return validate.__wrapped__(*arguments)


@lru_cache(maxsize=4096, typed=True)  # True and 1 are one key otherwise
def _validate(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    q_device: torch.device,
    k_device: torch.device,
    v_device: torch.device,
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    aligned_bases: bool,
    features: Features,
) -> AttentionSpec:
    shapes = (("q", q_shape), ("k", k_shape), ("v", v_shape))
    for name, shape in shapes:
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, nheads, headdim), "
                f"got shape {tuple(shape)}"
            )
    if q_dtype not in REFERENCE_DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q_dtype}")
    for name, dtype in (("k", k_dtype), ("v", v_dtype)):
        if dtype != q_dtype:
            raise TypeError(f"{name} must have q's dtype {q_dtype}, got {dtype}")
    for name, device in (("k", k_device), ("v", v_device)):
        if device != q_device:
            raise ValueError(f"{name} must be on q's device {q_device}, got {device}")

    batch, seqlen_q, nheads, headdim = q_shape
    _, seqlen_k, nheads_k, headdim_v = v_shape
    for name, shape in shapes[1:]:
        if shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {shape[0]}")
    if k_shape[3] != headdim:
        raise ValueError(f"k must have q's headdim {headdim}, got {k_shape[3]}")
    if k_shape[1] != seqlen_k:
        raise ValueError(f"v must have k's seqlen {k_shape[1]}, got {seqlen_k}")
    if k_shape[2] != nheads_k:
        raise ValueError(f"v must have k's nheads {k_shape[2]}, got {nheads_k}")
    if (nheads_k == 0 and nheads != 0) or (nheads_k != 0 and nheads % nheads_k != 0):
        raise ValueError(f"nheads of q ({nheads}) must be a multiple of nheads of k ({nheads_k})")
    for name, size in (("headdim of q and k", headdim), ("headdim of v", headdim_v)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    layouts = (("q", q_shape, q_stride), ("k", k_shape, k_stride), ("v", v_shape, v_stride))
    for name, shape, stride in layouts:
        if stride[3] != 1 and shape[3] > 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension (stride 1), got stride {stride[3]}; "
                f"call {name}.contiguous() first"
            )
    if softmax_scale is None:
        softmax_scale = headdim**-0.5
    elif isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise TypeError(
            f"softmax_scale must be a number or None, got {type(softmax_scale).__name__}"
        )
    elif not -3.0e38 < softmax_scale < 3.0e38:
        raise ValueError(f"softmax_scale must be finite in float32, got {softmax_scale}")
    elif abs(softmax_scale) < SMALLEST_FLOAT32 and q_dtype != torch.float64:
        softmax_scale = 0.0  # as a GPU flushes it; kernels treat 0 by itself
    for name, flag in (
        ("causal", causal),
        ("deterministic", deterministic),
        ("allow_tf32", allow_tf32),
    ):
        check_flag(name, flag)
    if features.blocks is not None:
        _check_blocks(features.blocks, batch, nheads, seqlen_q, seqlen_k)
    causal, features = _narrowest(causal, features, seqlen_q, seqlen_k)
    return AttentionSpec(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads=nheads,
        nheads_k=nheads_k,
        headdim=headdim,
        headdim_v=headdim_v,
        dtype=q_dtype,
        softmax_scale=float(softmax_scale),
        causal=causal,
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        # While compiling, strides may be symbols; the operator will see numbers.
        tma=torch.compiler.is_compiling()
        or (aligned_bases and all(_tma_can_read(s, st, q_dtype) for _, s, st in layouts)),
        features=features,
    )


def window_of(window_size: object) -> tuple[int | None, int | None]:
    """`(left, right)` with None for unbounded, of what a user gives: -1 and None are one.

    Raises:
        TypeError: not a pair, or not of ints.
        ValueError: less than -1.
    """
    if window_size is None:
        return None, None
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {shown(window_size)}")
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(
                f"window_size must hold ints or None, got {window_size!r}; -1 and None are "
                "unbounded"
            )
        if side is not None and side < -1:
            raise ValueError(
                f"window_size must be at least 0, or -1 or None for unbounded, got {window_size!r}"
            )
    left, right = window_size
    return None if left == -1 else left, None if right == -1 else right


def _narrowest(
    causal: bool, features: Features, seqlen_q: int, seqlen_k: int
) -> tuple[bool, Features]:
    """The one form of calls that mean the same: no window that hides nothing, or what causal does.

    A right window of 0 is causal; causal swallows any other.
    """
    left, right = features.window_left, features.window_right
    if left is None and right is None:
        return causal, features
    causal = causal or right == 0
    if causal or (right is not None and right >= seqlen_q - 1):
        right = None
    if left is not None and left >= seqlen_k - 1:
        left = None
    return causal, replace(features, window_left=left, window_right=right)


def _check_blocks(blocks: Blocks, batch: int, nheads: int, seqlen_q: int, seqlen_k: int) -> None:
    for name, has, wanted in (
        ("seqlen_q", blocks.seqlen_q, seqlen_q),
        ("seqlen_k", blocks.seqlen_k, seqlen_k),
    ):
        if has != wanted:
            raise ValueError(f"block_mask must be made for {name} {wanted}, got one for {has}")
    for name, has, wanted in (("batch", blocks.batch, batch), ("nheads", blocks.nheads, nheads)):
        if has not in (1, wanted):
            raise ValueError(
                f"block_mask must be made for {name} {wanted}, or 1 or None for all, got one for "
                f"{has}"
            )


def _check_extras(
    spec: AttentionSpec,
    names: tuple[str, ...],
    extras: Sequence[torch.Tensor],
    device: torch.device,
) -> None:
    if len(extras) != len(names):
        raise ValueError(f"extras must be the tensors {names}, got {len(extras)} tensors")
    for name, tensor in zip(names, extras, strict=True):
        check_tensors(**{name: tensor})
        if tensor.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {tensor.device}")
        # As complex.conj().imag is. Operators get q, k and v in order, but not this list.
        if not torch.compiler.is_compiling() and tensor.is_neg():
            raise ValueError(
                f"{name} must be in memory as it is, got the negation of what is there; call "
                f"{name}.resolve_neg() first"
            )
        if name == "bias":
            _check_bias(spec, tensor)
        elif not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tuple(tensor.stride())} of shape "
                f"{tuple(tensor.shape)}; call .contiguous() first"
            )
        if name in BLOCK_LISTS:
            assert spec.features.blocks is not None  # for the type checker: names come from it
            shape = spec.features.blocks.shapes[BLOCK_LISTS.index(name)]
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of block_mask must be int32 of shape {shape}, got {tensor.dtype} of "
                    f"shape {tuple(tensor.shape)}"
                )
        if name == "alibi_slopes":
            if tensor.dtype != torch.float32:
                raise TypeError(f"alibi_slopes must be float32, got {tensor.dtype}")
            allowed = ((spec.nheads,), (spec.batch, spec.nheads))
            if tuple(tensor.shape) not in allowed:
                raise ValueError(
                    "alibi_slopes must have shape (nheads,) or (batch, nheads), here "
                    f"{allowed[0]} or {allowed[1]}, got {tuple(tensor.shape)}"
                )
        elif name == "dropout_seed":
            if tensor.dtype != torch.int64:
                raise TypeError(f"dropout_seed must be int64, got {tensor.dtype}")
            if tuple(tensor.shape) != (1,):
                raise ValueError(f"dropout_seed must have shape (1,), got {tuple(tensor.shape)}")
        elif name == "sinks":
            if tensor.dtype not in (torch.float32, spec.dtype):
                raise TypeError(
                    f"sinks must be float32 or of q's dtype {spec.dtype}, got {tensor.dtype}"
                )
            if tuple(tensor.shape) != (spec.nheads,):
                raise ValueError(
                    f"sinks must have shape (nheads,), here ({spec.nheads},), got "
                    f"{tuple(tensor.shape)}"
                )


def _check_bias(spec: AttentionSpec, bias: torch.Tensor) -> None:
    if bias.dtype not in (torch.float32, spec.dtype):
        raise TypeError(f"bias must be float32 or of q's dtype {spec.dtype}, got {bias.dtype}")
    sizes = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    if bias.dim() != 4 or any(n not in (1, m) for n, m in zip(bias.shape, sizes, strict=True)):
        raise ValueError(
            "bias must have shape (batch or 1, nheads or 1, seqlen_q or 1, seqlen_k or 1), here "
            f"each 1 or that of {sizes}, got {tuple(bias.shape)}"
        )


def make_varlen_spec(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    aligned_bases: bool = True,
    features: Features = PLAIN,
    extras: Sequence[torch.Tensor] = (),
) -> AttentionSpec:
    """`make_spec` for packed tensors; what cu_seqlens and seqused hold is not looked at.

    Raises:
        TypeError, ValueError: as `make_spec`, and for what tells where the sequences are.
    """
    check_tensors(q=q, k=k, v=v)
    for name, tensor in sequences._asdict().items():
        if tensor is not None or not name.startswith("seqused"):
            check_tensors(**{name: tensor})
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
            raise TypeError(
                f"{name} must be an int, got {type(longest).__name__}; reading a tensor would wait "
                "for the GPU"
            )
    if features.blocks is not None:
        raise ValueError(
            "block_mask is of padded tensors: packed sequences do not see each other without one"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (total, nheads, headdim), got shape "
                f"{tuple(tensor.shape)}"
            )
    total_q, total_k = q.shape[0], k.shape[0]
    if v.shape[0] != total_k:
        raise ValueError(f"v must have k's {total_k} rows, got {v.shape[0]}")
    spec = _remembered(
        _validate_varlen,
        (
            *((t.shape[1:], t.dtype, t.device, t.stride()) for t in (q, k, v)),
            *(None if t is None else _metadata(t) for t in sequences),
            min(max_seqlen_q, total_q), min(max_seqlen_k, total_k),
            Varlen(_power_below(total_q), _power_below(total_k)),
            softmax_scale, causal, deterministic, allow_tf32, aligned_bases, features,
        ),
    )  # fmt: skip
    if extras or features is not PLAIN:
        _check_extras(spec, features.names, extras, q.device)
    return spec


_Metadata = tuple[tuple[int, ...], torch.dtype, torch.device, tuple[int, ...]]


def _metadata(tensor: torch.Tensor) -> _Metadata:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _power_below(total: int) -> int:
    # While tracing it may be a symbol; the operator will see a number.
    symbol = torch.compiler.is_compiling() or isinstance(total, torch.SymInt)
    return 0 if symbol else 1 << total.bit_length() >> 1


@lru_cache(maxsize=4096, typed=True)
def _validate_varlen(
    q: _Metadata,
    k: _Metadata,
    v: _Metadata,
    cu_seqlens_q: _Metadata,
    cu_seqlens_k: _Metadata,
    seqused_q: _Metadata | None,
    seqused_k: _Metadata | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    about: Varlen,
    *options: Any,
) -> AttentionSpec:
    """Without totals, so that it remembers: shapes of q, k, v are `(nheads, headdim)`, and no
    max_seqlen exceeds its total."""
    for name, indices in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
        ("seqused_q", seqused_q),
        ("seqused_k", seqused_k),
    ):
        if indices is not None:
            _check_indices(name, *indices, q[2])
    batch = cu_seqlens_q[0][0] - 1
    if batch < 0:
        raise ValueError("cu_seqlens_q must have batch + 1 entries, got none")
    if cu_seqlens_k[0][0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's {batch + 1} entries (batch + 1), "
            f"got {cu_seqlens_k[0][0]}"
        )
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None and used[0][0] != batch:
            raise ValueError(f"{name} must have batch = {batch} entries, got {used[0][0]}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name} must be at least 0, got {longest}")
    # Sequences as entries of a batch, each of which begins where it will.
    limits = ((q, max_seqlen_q), (k, max_seqlen_k), (v, max_seqlen_k))
    spec = _validate.__wrapped__(
        *((batch, longest, *shape) for (shape, *_), longest in limits),
        *(dtype for _, dtype, _, _ in (q, k, v)),
        *(device for _, _, device, _ in (q, k, v)),
        *((stride[0], *stride) for _, _, _, stride in (q, k, v)),
        *options,
    )
    return replace(spec, varlen=about)


def _check_indices(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    stride: tuple[int, ...],
    device_of_q: torch.device,
) -> None:
    if dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype}")
    if device != device_of_q:
        raise ValueError(f"{name} must be on q's device {device_of_q}, got {device}")
    if len(shape) != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {tuple(shape)}")
    if stride[0] != 1 and shape[0] > 1:
        raise ValueError(f"{name} must be contiguous, got stride {stride[0]}")


def _tma_can_read(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Strides are multiples of 16 bytes and not 0, but for dimensions of size 1, where any will do.

    Nothing is read of an empty tensor.
    """
    return 0 in shape or all(
        n == 1 or (s > 0 and s * dtype.itemsize % 16 == 0)
        for n, s in zip(shape[:3], stride[:3], strict=True)
    )
