"""Windows, softcap, ALiBi, and modifications of scores and masks that users write."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    GPU,
    KERNEL_DTYPES,
    assert_bitwise_equal,
    check,
    compiled_and_not,
    every_row,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from triflash import attention, mods, registry
from triflash.bench.variant_mods import SOFT_SIGN
from triflash.spec import FEATURES, PLAIN, Features, Mod, features_of_text, window_of
from triflash.target import Target
from triflash.testing import LAYOUTS, Case, make_inputs

FLOAT = torch.float32


@triton.jit
def relative(score, b, h, q_idx, kv_idx, aux):
    table, reach = aux[0], aux[1]
    apart = tl.minimum(tl.maximum(kv_idx - q_idx, -reach), reach) + reach
    return score + tl.load(table + h * (2 * reach + 1) + apart)


@triton.jit
def relative_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    return dscore


@triton.jit
def relative_gradient(dscore, score, b, h, q_idx, kv_idx, aux, grads):
    apart = tl.minimum(tl.maximum(kv_idx - q_idx, -aux[1]), aux[1]) + aux[1]
    tl.atomic_add(grads[0] + h * (2 * aux[1] + 1) + apart, dscore)


def relative_reference(score, b, h, q_idx, kv_idx, aux):
    table, reach = aux[:2]
    return score + table[h, (kv_idx - q_idx).clamp(-reach, reach) + reach]


@triton.jit
def document(b, h, q_idx, kv_idx, aux):
    ids, _, seqlen_k = aux
    return tl.load(ids + b * seqlen_k + q_idx % seqlen_k) == tl.load(ids + b * seqlen_k + kv_idx)


def document_reference(b, h, q_idx, kv_idx, aux):
    return aux[0][b, q_idx % aux[2]] == aux[0][b, kv_idx]


RELATIVE = mods.score_mod(
    relative,
    derivative=relative_derivative,
    gradient=relative_gradient,
    reference=relative_reference,
)
DOCUMENT = mods.mask_mod(document, reference=document_reference)


def table(case: Case, device: torch.device) -> tuple[torch.Tensor, int]:
    values = torch.linspace(-2, 2, case.nheads * 15, device=device, dtype=FLOAT)
    return values.view(case.nheads, 15).requires_grad_(), 7


def ids(case: Case, device: torch.device) -> tuple[torch.Tensor]:
    position = torch.arange(case.seqlen_k, device=device, dtype=torch.int32)
    return ((position // 11).expand(case.batch, -1).contiguous(),)


FEATURED = {
    "left": {"window_size": (11, None)},
    "right": {"window_size": (None, 9)},
    "both": {"window_size": (40, 3)},
    "only itself": {"window_size": (0, 0)},
    "left, causal": {"window_size": (17, -1), "causal": True},
    "softcap": {"softcap": 2.0},
    "softcap reached": {"softcap": 50.0, "softmax_scale": 8.0, "causal": True},
    "soft sign": {"score_mod": SOFT_SIGN, "make_aux": lambda *_: (3.0,), "causal": True},
    "soft sign, negative scale": {
        "score_mod": SOFT_SIGN, "make_aux": lambda *_: (40.0,), "softmax_scale": -2.0,
        "sinks": FLOAT,
    },
    "alibi": {"alibi": "heads"},
    "alibi of batch": {"alibi": "batch and heads", "causal": True},
    "softcap, alibi, window": {"softcap": 5.0, "alibi": "heads", "window_size": (30, 30)},
    "learned bias": {"score_mod": RELATIVE, "make_aux": table, "causal": True},
    "negative scale": {"softmax_scale": -0.5, "softcap": 2.0, "window_size": (None, 30)},
    "documents": {"mask_mod": DOCUMENT, "make_aux": ids},
    "documents, causal": {"mask_mod": DOCUMENT, "make_aux": ids, "causal": True},
    "bias": {"bias": "bhqk"},
    "bias of heads, causal": {"bias": "hqk -", "causal": True},
    "bias of keys": {"bias": "bk -", "window_size": (30, 30)},
    "bias of queries": {"bias": "q float32", "alibi": "heads"},
    "bias expanded": {"bias": "hqk - expanded", "sinks": FLOAT},
    "dropout": {"dropout_p": 0.1},
    "dropout, causal": {"dropout_p": 0.5, "causal": True, "bias": "hqk -"},
    "dropout, softcap": {"dropout_p": 0.3, "softcap": 3.0, "window_size": (20, 9)},
    "dropout, sinks": {"dropout_p": 0.3, "sinks": FLOAT, "mask_mod": DOCUMENT, "make_aux": ids},
    "sinks": {"sinks": FLOAT},
    "sinks, causal": {"sinks": torch.float16, "causal": True},
    "sinks, window": {"sinks": FLOAT, "window_size": (17, 3), "softcap": 3.0},
    "sinks, learned bias": {"sinks": FLOAT, "score_mod": RELATIVE, "make_aux": table},
    "blocks": {"mask_mod": DOCUMENT, "make_aux": ids, "block_size": (128, 128)},
    "blocks, causal": {
        "mask_mod": DOCUMENT, "make_aux": ids, "block_size": (128, 64), "block_heads": True,
        "causal": True,
    },
    "blocks, sinks": {
        "mask_mod": DOCUMENT, "make_aux": ids, "block_size": (64, 64), "sinks": FLOAT,
    },
    "large blocks": {"mask_mod": DOCUMENT, "make_aux": ids, "block_size": (128, 128)},
    "larger blocks, alibi": {
        "mask_mod": DOCUMENT, "make_aux": ids, "block_size": (256, 256), "block_heads": True,
        "alibi": "heads", "causal": True,
    },
}  # fmt: skip
BIASES = (
    "bhqk", "bhqk -", "hqk float32", "qk - expanded", "hk", "bk -", "bq float32 -", "bhqk expanded",
    "h",
)  # fmt: skip
LENGTHS = [(70, 70), (40, 90), (90, 40)] if not GPU else [(1000, 1000), (300, 700), (700, 300)]


@st.composite
def featured_cases(draw: st.DrawFn) -> Case:
    """Any features that can meet, in any call."""
    masks = draw(st.booleans())
    learned = not masks and draw(st.booleans())
    block_size = draw(st.sampled_from([None, (64, 64), (64, 128), (192, 64)])) if masks else None
    longest = 900 if GPU else 140 if block_size else 70
    seqlen_k = draw(st.integers(1, longest))
    side = st.one_of(st.none(), st.integers(0, 2 * seqlen_k))
    nheads_k = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    return Case(
        batch=draw(st.integers(1, 2)),
        seqlen_q=draw(st.integers(1, longest)),
        seqlen_k=seqlen_k,
        nheads=nheads_k * draw(st.integers(1, 2)),
        nheads_k=nheads_k,
        headdim=draw(st.integers(1, 128 if GPU else 40)),
        dtype=dtype,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.one_of(st.none(), st.floats(-1, 1, width=32))),
        with_dlse=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
        window_size=(draw(side), draw(side)),
        softcap=draw(st.sampled_from([0.0, 0.5, 1.0, 30.0])),
        alibi=draw(st.sampled_from(["", "heads", "batch and heads"])),
        mask_mod=DOCUMENT if masks else None,
        score_mod=RELATIVE if learned else None,
        make_aux=ids if masks else table if learned else None,
        block_size=block_size,
        block_heads=draw(st.booleans()),
        sinks=draw(st.sampled_from([None, FLOAT, dtype])),
        bias=draw(st.sampled_from(["", "", *BIASES])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.93])),
    )


@pytest.mark.parametrize("implementation", ["v2", "reference"])
@given(case=featured_cases())
def test_any_features(implementation, case, device):
    check(case, implementation, device)


@pytest.mark.sampled(3)
@every_row
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("feature", FEATURED)
def test_features(implementation, feature, lengths, device):
    case = Case(
        batch=2, seqlen_q=lengths[0], seqlen_k=lengths[1], nheads=2, nheads_k=1, headdim=16,
        dtype=FLOAT if "learned bias" in feature else torch.float16, with_dlse=True,
        **FEATURED[feature],
    )  # fmt: skip
    check(case, implementation, device)


@pytest.mark.parametrize("feature", ["alibi", "learned bias", "documents, causal", "bias"])
def test_whole_tiles(feature, device):
    """Where all positions exist, modifications are not guarded against those that do not."""
    n = 512 if GPU else 64
    case = Case(
        seqlen_q=n, seqlen_k=n, nheads=2, headdim=16, dtype=FLOAT, with_dlse=True,
        **FEATURED[feature],
    )  # fmt: skip
    assert mods.inside(case.spec(), 32, 64)
    assert not mods.inside(replace(case, seqlen_q=n - 1).spec(), 32, 64)
    assert not mods.inside(replace(case, seqlen_k=n + 1).spec(), 32, 64)
    assert not mods.inside(Case(seqlen_q=n, seqlen_k=n).spec(), 32, 64)
    check(case, "v2", device)


def test_windows_are_what_flash_attn_says():
    """Inclusive on both sides, aligned to the bottom right; written out."""
    q, k = torch.zeros(1, 3, 1, 8), torch.zeros(1, 5, 1, 8)
    v = torch.eye(5).view(1, 5, 1, 5)
    out = attention(q, k, v, window_size=(1, 1), implementation="reference")
    seen = (out[0, :, 0] > 0).int().tolist()
    assert seen == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("causal", "window", "canonical"),
    [
        (False, (-1, -1), (False, None, None)),
        (False, (None, 0), (True, None, None)),
        (False, (3, 0), (True, 3, None)),
        (True, (3, 5), (True, 3, None)),
        (True, (None, 5), (True, None, None)),
        (False, (3, -1), (False, 3, None)),
        (False, (7, 5), (False, None, None)),  # they hide nothing of 6 queries and 8 keys
        (False, (6, 4), (False, 6, 4)),
        (True, [0, 0], (True, 0, None)),
    ],
)
def test_one_form_of_windows_that_mean_the_same(causal, window, canonical):
    spec = Case(seqlen_q=6, seqlen_k=8, causal=causal, window_size=window).spec()
    assert (spec.causal, spec.features.window_left, spec.features.window_right) == canonical


def test_text_of_features_tells_all():
    scores = (Mod("softcap", (2.5,)), Mod("m.f", ("aux0", 4, 1e-30)))
    features = Features(3, None, scores, Mod("m.g"), True, ("aux0", "sinks"))
    assert features_of_text(features.text) == features
    assert features.names == ("aux0", "sinks")
    assert features_of_text("sinks") == Features(sinks=True)
    assert PLAIN.text == ""
    assert features_of_text("") is PLAIN


def test_refusals_name_the_feature_and_who_has_it():
    for feature, words in FEATURES.items():
        if feature == "varlen":
            continue  # test_varlen.py
        having = {row.name for row in registry.IMPLEMENTATIONS if feature in row.features}
        assert "reference" in having
        some = next(f for f in FEATURED.values() if feature in Case(**f).spec().features.uses)
        reason = registry.get("v1").supports(Case(**some).spec(), Target("cuda", "sm_90", 132))
        assert reason.startswith("v1 does not have")
        first = Case(**some).spec().features.uses[0]
        assert FEATURES[first] in reason
        assert all(name in reason for name in having) or first != feature
        assert "(" in words


def _plain(score, b, h, q_idx, kv_idx, aux):
    return score


@triton.jit
def short(score, b, h, q_idx, kv_idx):
    return score


BAD = {
    "window a number": ({"window_size": 3}, TypeError, ["window_size", "pair", "3"]),
    "window too long": ({"window_size": (1, 2, 3)}, TypeError, ["window_size", "(1, 2, 3)"]),
    "window of floats": ({"window_size": (1.0, 2)}, TypeError, ["window_size", "ints", "1.0"]),
    "window negative": ({"window_size": (-2, 0)}, ValueError, ["window_size", "-2"]),
    "softcap negative": ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, ["softcap", "inf"]),
    "softcap subnormal": ({"softcap": 1e-40}, ValueError, ["softcap", "1e-40", "2^-126"]),
    "softcap a word": ({"softcap": "2"}, TypeError, ["softcap", "str"]),
    "slopes a list": ({"alibi_slopes": [1.0]}, TypeError, ["alibi_slopes", "list"]),
    "slopes of half": (
        {"alibi_slopes": torch.ones(4).half()}, TypeError, ["alibi_slopes", "float32", "float16"],
    ),
    "slopes of 3 heads": (
        {"alibi_slopes": torch.ones(3)}, ValueError, ["alibi_slopes", "(4,)", "(2, 4)", "(3,)"],
    ),
    "slopes elsewhere": (
        {"alibi_slopes": torch.ones(4, device="meta")}, ValueError, ["alibi_slopes", "meta"],
    ),
    "slopes strided": (
        {"alibi_slopes": torch.ones(1).expand(4)}, ValueError, ["alibi_slopes", "contiguous"],
    ),
    "bare score_mod": ({"score_mod": _plain}, TypeError, ["score_mod", "triflash.mods", "_plain"]),
    "bare mask_mod": ({"mask_mod": document}, TypeError, ["mask_mod", "document"]),
    "aux alone": ({"aux": (1,)}, ValueError, ["aux", "score_mod"]),
    "aux None": ({"aux": None}, TypeError, ["aux", "NoneType"]),
    "aux a tensor alone": ({"aux": torch.ones(3)}, TypeError, ["aux", "Tensor"]),
    "aux a tensor": ({"mask_mod": DOCUMENT, "aux": torch.ones(3)}, TypeError, ["aux", "Tensor"]),
    "aux of words": ({"mask_mod": DOCUMENT, "aux": ("x",)}, TypeError, ["aux[0]", "str"]),
    "aux of a long int": ({"mask_mod": DOCUMENT, "aux": (2**63,)}, ValueError, ["aux[0]", "64"]),
    "aux complex": (
        {"mask_mod": DOCUMENT, "aux": (torch.ones(3) * 1j,)}, TypeError, ["aux[0]", "complex64"],
    ),
    "aux elsewhere": (
        {"mask_mod": DOCUMENT, "aux": (torch.ones(3, device="meta"),)}, ValueError,
        ["aux0", "meta"],
    ),
    "bias a number": ({"bias": 0.0}, TypeError, ["bias", "Tensor", "float"]),
    "bias of bools": (
        {"bias": torch.ones(2, 4, 5, 5).bool()}, TypeError, ["bias", "float32", "torch.bool"],
    ),
    "bias of two dimensions": (
        {"bias": torch.ones(5, 5)}, ValueError, ["bias", "seqlen_q or 1", "(2, 4, 5, 5)", "(5, 5)"],
    ),
    "bias of another length": (
        {"bias": torch.ones(1, 1, 5, 6)}, ValueError, ["bias", "(2, 4, 5, 5)", "(1, 1, 5, 6)"],
    ),
    "bias elsewhere": ({"bias": torch.ones(1, 1, 1, 1, device="meta")}, ValueError, ["bias"]),
    "sinks a number": ({"sinks": 0.0}, TypeError, ["sinks", "Tensor", "float"]),
    "sinks of 3 heads": ({"sinks": torch.ones(3)}, ValueError, ["sinks", "(nheads,)", "4", "(3,)"]),
    "sinks for each row": ({"sinks": torch.ones(2, 4)}, ValueError, ["sinks", "(2, 4)"]),
    "sinks of ints": ({"sinks": torch.ones(4).int()}, TypeError, ["sinks", "float32", "int32"]),
    "sinks of half": ({"sinks": torch.ones(4).half()}, TypeError, ["sinks", "float32", "float16"]),
    "sinks elsewhere": ({"sinks": torch.ones(4, device="meta")}, ValueError, ["sinks", "meta"]),
    "sinks strided": ({"sinks": torch.ones(1).expand(4)}, ValueError, ["sinks", "contiguous"]),
}  # fmt: skip


WRONG_REFERENCES = {
    "nothing": lambda x: None,
    "a number": lambda x: 1,
    "ints": lambda x: x.int(),
    "another dtype": lambda x: x.double(),
    "five dimensions": lambda x: x[None],
    "another length": lambda x: x[..., :3],
}


@pytest.mark.parametrize("wrong", WRONG_REFERENCES)
def test_references_that_give_something_else(wrong, device):
    """PyTorch would broadcast the most of it."""
    give = WRONG_REFERENCES[wrong]
    q = torch.randn(2, 5, 4, 16, device=device)
    of_scores = mods.score_mod(relative, reference=lambda score, *_: give(score))
    of_masks = mods.mask_mod(
        document, reference=lambda b, h, q_idx, kv_idx, aux: give(kv_idx <= q_idx)
    )
    for options, dtype in (({"score_mod": of_scores}, "float32"), ({"mask_mod": of_masks}, "bool")):
        with pytest.raises(TypeError, match=rf"reference of .* must return {dtype} .*, got"):
            attention(q, q, q, **options, implementation="reference")


def test_a_reference_that_gives_one_for_all_keys(device):
    q, k, v = (torch.randn(2, 5, 4, 16, device=device, requires_grad=True) for _ in range(3))
    mod = mods.score_mod(
        relative, derivative=relative_derivative, reference=lambda score, *_: score[..., :1]
    )
    out = attention(q, k, v, score_mod=mod, implementation="reference")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    dq, dv = torch.autograd.grad(out.sum(), (q, v))
    torch.testing.assert_close(dq, torch.zeros_like(q), atol=1e-5, rtol=0)
    torch.testing.assert_close(dv, torch.ones_like(v))


def test_keys_can_stand_in_the_text_of_features():
    """A file that `triflash mask` loads may be called anything."""
    inner = types.SimpleNamespace(__module__="_mask_of_a,b;c=d", __qualname__="f.<locals>.g")
    key = mods._new_key(types.SimpleNamespace(fn=inner))
    features = Features(mask_mod=Mod(key, (1, "aux1")))
    assert features_of_text(features.text) == features


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad, device):
    options, error, words = BAD[bad]
    q = torch.randn(2, 5, 4, 16, device=device)
    options = {
        name: value.to(device).as_strided(value.shape, value.stride())
        if getattr(value, "is_cpu", False)
        else value
        for name, value in options.items()
    }
    with pytest.raises(error) as caught:
        attention(q, q, q, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("name", "shape"), [("bias", (1, 1, 5, 5)), ("alibi_slopes", (4,))])
def test_extras_that_are_negated_when_they_are_read(name, shape, device):
    """Kernels would read what lies there."""
    q = torch.randn(2, 5, 4, 16, device=device)
    tensor = torch._neg_view(torch.randn(shape, device=device))
    with pytest.raises(ValueError, match=rf"{name} must be .*{name}\.resolve_neg\(\)"):
        attention(q, q, q, **{name: tensor})
    attention(q, q, q, **{name: tensor.resolve_neg()})


def test_bad_functions():
    with pytest.raises(TypeError, match=r"score_mod must be a @triton.jit function.*_plain"):
        mods.score_mod(_plain)
    with pytest.raises(TypeError, match=r"score_mod short must take .*aux.*, got"):
        mods.score_mod(short)
    with pytest.raises(TypeError, match="mask_mod relative must take"):
        mods.mask_mod(relative)
    with pytest.raises(TypeError, match="derivative relative must take"):
        mods.score_mod(relative, derivative=relative)
    with pytest.raises(TypeError, match="gradient relative must take"):
        mods.score_mod(relative, gradient=relative)
    with pytest.raises(TypeError, match="fused short must take"):
        mods.score_mod(relative, fused=short)
    with pytest.raises(TypeError, match=r"bound must be a function .*, got float"):
        mods.score_mod(relative, bound=20.0)
    with pytest.raises(TypeError, match=r"reference must be a function .* of Python, got"):
        mods.score_mod(relative, reference=relative)
    with pytest.raises(TypeError, match=r"reference must be a function .* of Python, got str"):
        mods.mask_mod(document, reference="document")


def test_bounds_of_scores():
    def bound(**options):
        return mods.score_bound(mods.features_of(**options)[0])

    capped = mods.score_mod(relative, bound=lambda aux: None if aux[0] is None else 2 * aux[0])
    assert bound() is None
    assert bound(window_size=(3, 3)) is None
    assert bound(softcap=30.0) == 30.0
    assert bound(softcap=30.0, alibi_slopes=torch.ones(2)) is None
    assert bound(score_mod=RELATIVE) is None
    assert bound(score_mod=capped, aux=(7,), softcap=3.0) == 14.0
    assert bound(score_mod=capped, aux=(torch.ones(1),)) is None
    assert bound(score_mod=capped, aux=(7,), bias=torch.ones(1, 1, 1, 1)) is None


@triton.jit
def halved(score, b, h, q_idx, kv_idx, aux):
    return score.to(tl.float16)


@triton.jit
def summed(dscore, score, b, h, q_idx, kv_idx, aux):
    return tl.sum(dscore, 0)


@triton.jit
def weighing(b, h, q_idx, kv_idx, aux):
    return (q_idx - kv_idx) * 1.0


def test_functions_that_return_something_else(device):
    q = torch.randn(1, 5, 2, 16, device=device, dtype=torch.float16, requires_grad=True)
    good = mods.score_mod(relative, derivative=summed)
    for options, words in (
        ({"score_mod": mods.score_mod(halved, derivative=relative_derivative)}, r"halved.*float32"),
        ({"mask_mod": mods.mask_mod(weighing)}, r"weighing.*bool"),
    ):
        with pytest.raises(TypeError, match=words):
            attention(q, q, q, implementation="v2", **options)
    bias = torch.zeros(2, 15, device=device)
    out = attention(q, q, q, implementation="v2", score_mod=good, aux=(bias, 7))
    with pytest.raises(TypeError, match=r"relative.*derivative.*float32"):
        out.sum().backward()


def test_deterministic_has_no_atomic_gradients(device):
    q = torch.randn(1, 5, 2, 16, device=device, dtype=torch.float16, requires_grad=True)
    options = {"score_mod": RELATIVE, "implementation": "v2", "deterministic": True}
    bias = torch.zeros(2, 15, device=device)
    attention(q, q, q, aux=(bias, 7), **options)
    with pytest.raises(NotImplementedError, match="deterministic=True with a gradient of aux0"):
        attention(q, q, q, aux=(bias.requires_grad_(), 7), **options)
    options = {"implementation": "v2", "deterministic": True}
    added = torch.zeros(1, 1, 1, 1, device=device)
    attention(q, q, q, bias=added, **options)
    with pytest.raises(NotImplementedError, match="deterministic=True with a gradient of bias"):
        attention(q, q, q, bias=added.requires_grad_(), **options)


def test_gradients_of_sinks_are_deterministic(device):
    """Which deterministic=True allows, and a loss of lse alone has one too."""
    n = 128 if GPU else 66
    case = Case(2, n - 30, n, nheads=4, nheads_k=2, with_dlse=True, sinks=FLOAT, causal=True)
    inputs = make_inputs(case, device)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.extras["sinks"])]

    def gradients():
        out, lse = attention(
            *leaves[:3], sinks=leaves[3], causal=True, return_lse=True, deterministic=True,
            implementation="v2",
        )  # fmt: skip
        grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
        out, lse = attention(
            *leaves[:3], sinks=leaves[3], causal=True, return_lse=True, implementation="v2"
        )
        (of_lse,) = torch.autograd.grad(lse, leaves[3], inputs.dlse)
        p = (leaves[3].unsqueeze(-1) - lse).exp()
        torch.testing.assert_close(of_lse, (p * inputs.dlse).sum((0, 2)))
        return dict(enumerate(grads))

    assert_bitwise_equal(gradients(), gradients())


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_sinks_of_any_size(implementation, device):
    """As a key of value 0; far above all scores, far below, and none at all."""
    q, k, v = (torch.randn(1, n, 5, 16, device=device) for n in (40, 33, 33))
    sinks = torch.tensor([0.0, 1e4, -1e4, float("-inf"), 300.0], device=device)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True, implementation=implementation)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).double() / 4
    column = sinks.double().view(1, -1, 1, 1).expand(1, 5, 40, 1)
    scores = torch.cat([scores, column], -1)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :-1], v.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    _, lse = attention(
        q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True, implementation=implementation
    )
    torch.testing.assert_close(lse, sinks.view(1, -1, 1).expand(1, 5, 40))


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_bias_may_lie_anyhow(implementation, device):
    """Transposed, sliced, expanded, and one after the other of other sizes in the same kernels.

    A GPU compiles anew for other strides, and may contract other products and sums.
    """
    exact = {"rtol": 1e-5, "atol": 1e-6} if GPU else {"rtol": 0, "atol": 0}
    q, k, v = (torch.randn(2, n, 3, 16, device=device) for n in (20, 33, 33))
    full = torch.randn(2, 3, 20, 33, device=device)
    around = torch.full((3, 4, 22, 40), float("nan"), device=device)
    inside = around[1:, 1:, 1:-1, 3:36].copy_(full)
    turned = full.transpose(2, 3).contiguous().transpose(2, 3)
    first = attention(q, k, v, bias=full, implementation=implementation)
    for bias in (inside, turned, full):
        again = attention(q, k, v, bias=bias, implementation=implementation)
        torch.testing.assert_close(again, first, **exact)
    for small in (full[:1], full[:, :1], full[:, :, :1], full[..., :1], full[:1, :1, :1, :1]):
        calls = [
            attention(q, k, v, bias=bias, implementation=implementation)
            for bias in (small, small.expand(full.shape), small.expand(full.shape).contiguous())
        ]
        torch.testing.assert_close(calls[1], calls[0], **exact)
        torch.testing.assert_close(calls[2], calls[0], **exact)


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_bias_is_the_mask_of_pytorch(implementation, device):
    """scaled_dot_product_attention's attn_mask, -inf in it and the least float32."""
    q, k, v = (torch.randn(2, n, 3, 16, device=device) for n in (20, 33, 33))
    hidden = torch.rand(2, 1, 20, 33, device=device) < 0.3
    plain = torch.randn(2, 3, 20, 33, device=device)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    for least in (float("-inf"), torch.finfo(FLOAT).min, torch.finfo(torch.bfloat16).min):
        bias = plain.masked_fill(hidden, least).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the others differ in rows without keys
            expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias)
        out = attention(q, k, v, bias=bias, implementation=implementation)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
        dout = torch.randn_like(out)
        (dbias,) = torch.autograd.grad(out, bias, dout)
        (wanted,) = torch.autograd.grad(expected, bias, dout.transpose(1, 2))
        torch.testing.assert_close(dbias, wanted, rtol=1e-4, atol=1e-5)
        assert not dbias[hidden.expand_as(dbias)].any()
        nothing = torch.full_like(bias, least)
        out, lse = attention(
            q, k, v, bias=nothing, return_lse=True, implementation=implementation
        )  # fmt: skip
        assert not out.any()
        assert (lse == float("-inf")).all()


def test_gradients_that_nobody_wrote_are_refused(device):
    q = torch.randn(1, 5, 2, 16, device=device, requires_grad=True)
    only_forward = mods.score_mod(relative, reference=relative_reference)
    bias = torch.zeros(2, 15, device=device)
    with pytest.raises(NotImplementedError, match=r"relative.* has no derivative"):
        attention(q, q, q, score_mod=only_forward, aux=(bias, 7))
    with torch.no_grad():
        attention(q, q, q, score_mod=only_forward, aux=(bias, 7), implementation="reference")
    constant = mods.score_mod(
        relative, derivative=relative_derivative, reference=relative_reference
    )
    attention(q, q, q, score_mod=constant, aux=(bias, 7), implementation="reference").sum()
    with pytest.raises(NotImplementedError, match=r"relative.* has no gradient for aux0"):
        attention(q, q, q, score_mod=constant, aux=(bias.requires_grad_(), 7))


def test_slopes_have_no_gradient(device):
    q = torch.randn(1, 5, 2, 16, device=device)
    with pytest.raises(NotImplementedError, match="alibi_slopes cannot have a gradient: detach"):
        attention(q, q, q, alibi_slopes=torch.ones(2, device=device, requires_grad=True))


def test_numbers_that_are_equal_are_told_apart():
    """2 == 2.0 and 0.0 == -0.0, but a modification gets what was given, remembered or not."""
    got = []

    def record(score, b, h, q_idx, kv_idx, aux):
        got.append(repr(aux[0]))
        return score

    mod = mods.score_mod(relative, reference=record)
    q = torch.zeros(1, 1, 1, 16)
    for number in (2, 2.0, 2, 0.0, -0.0):
        attention(q, q, q, score_mod=mod, aux=(number,), implementation="reference")
    assert got == ["2", "2.0", "2", "0.0", "-0.0"]


def test_window_of():
    assert window_of((-1, None)) == (None, None)
    assert window_of([3, 0]) == (3, 0)
    assert window_of(None) == (None, None)


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_compile(implementation, device):
    """In one graph, with the gradient of aux, and the same bits as without."""
    q = torch.randn(2, 33, 2, 16, device=device, requires_grad=True)
    bias = torch.linspace(-1, 1, 30, device=device).view(2, 15).requires_grad_()
    sinks = torch.tensor([0.5, -2.0], device=device, requires_grad=True)
    slopes = torch.tensor([0.5, 0.25], device=device)
    added = torch.randn(1, 2, 33, 1, device=device, requires_grad=True)
    leaves = (q, bias, sinks, added)

    def call(q, bias, sinks, added):
        return attention(
            q, q * 2, q * 3, window_size=(20, 9), softcap=3.0, alibi_slopes=slopes,
            score_mod=RELATIVE, aux=(bias, 7), sinks=sinks, bias=added,
            implementation=implementation,
        )  # fmt: skip

    outputs, gradients = compiled_and_not(call, leaves)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for a, b in gradients:
        torch.testing.assert_close(a, b)  # atomic additions differ in the last bits


def test_opcheck(device):
    case = Case(seqlen_q=9, seqlen_k=11, headdim=16, dtype=FLOAT, **FEATURED["learned bias"])
    inputs = make_inputs(case, device)
    features, extras = mods.features_of(**inputs.extras)
    options = (0.25, True, False, False, "v2", features.text, list(extras))
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.triflash.attention_forward.default,
            (inputs.q, inputs.k, inputs.v, *options),
        )
