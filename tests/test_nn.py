"""MultiHeadAttention against torch.nn.MultiheadAttention in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import every_differentiable_row, skip_unsupported
from torch import nn

from triflash.nn import MultiHeadAttention
from triflash.testing import Case


def torch_module(device, *sizes, **options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(*sizes, batch_first=True, device=device, **options)
    for name, parameter in mha.named_parameters():
        if name.endswith("bias"):  # zero at first, which would hide them
            nn.init.normal_(parameter)
    return mha


def run(module, inputs, call):
    """out, then the gradients of the inputs and of the parameters by name."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(module, *inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    tensors = {"out": out.detach()}
    tensors |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return tensors | {name: p.grad for name, p in module.named_parameters()}


def assert_same(ours, oracle):
    assert ours.keys() == oracle.keys()
    for name, expected in oracle.items():
        error = (ours[name].double() - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name} is off by {error:.1e} of its size"


def compare(mha, module, inputs, mask=None):
    """`module` against a float64 copy of `mha`, forward and backward."""

    def torch_call(m, *xs):
        query, key, value = (*xs, *xs[-1:] * (3 - len(xs)))
        return m(query, key, value, attn_mask=mask, need_weights=False)[0]

    oracle = run(copy.deepcopy(mha).double(), [x.double() for x in inputs], torch_call)
    assert_same(run(module, inputs, lambda m, *xs: m(*xs)), oracle)


@every_differentiable_row
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_self_attention(implementation, causal, bias, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    mha = torch_module(device, 48, 3, bias=bias)
    module = MultiHeadAttention.from_torch(mha, causal=causal, implementation=implementation)
    x = torch.randn(2, 37, 48, device=device)
    mask = torch.ones(37, 37, dtype=torch.bool, device=device).triu(1) if causal else None
    compare(mha, module, [x], mask)


@every_differentiable_row
@pytest.mark.parametrize(("kdim", "vdim"), [(32, 32), (20, 32), (32, 12), (20, 12)])
def test_cross_attention(implementation, kdim, vdim, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    mha = torch_module(device, 32, 2, kdim=kdim, vdim=vdim)
    module = MultiHeadAttention.from_torch(mha, implementation=implementation)
    inputs = [
        torch.randn(2, n, size, device=device) for n, size in ((5, 32), (41, kdim), (41, vdim))
    ]
    compare(mha, module, inputs)


@every_differentiable_row
def test_the_value_is_the_key_unless_given(implementation, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    mha = torch_module(device, 32, 2)
    module = MultiHeadAttention.from_torch(mha, implementation=implementation)
    compare(mha, module, [torch.randn(2, n, 32, device=device) for n in (5, 41)])


@every_differentiable_row
@pytest.mark.parametrize("nheads_k", [1, 2])
def test_grouped_heads_equal_heads_repeated(implementation, nheads_k, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    torch.manual_seed(0)
    nheads, headdim = 4, 8
    embed_dim = nheads * headdim
    grouped = MultiHeadAttention(
        embed_dim, nheads, nheads_k, implementation=implementation, device=device
    )
    nn.init.normal_(grouped.in_proj_bias)

    def repeat(rows):
        q, k, v = rows.split((embed_dim, nheads_k * headdim, nheads_k * headdim))
        k, v = (
            t.unflatten(0, (nheads_k, headdim))
            .repeat_interleave(nheads // nheads_k, 0)
            .flatten(0, 1)
            for t in (k, v)
        )
        return torch.cat((q, k, v))

    mha = nn.MultiheadAttention(embed_dim, nheads, batch_first=True, device=device)
    state = grouped.state_dict()
    for name in ("in_proj_weight", "in_proj_bias"):
        state[name] = repeat(state[name])
    mha.load_state_dict(state)

    x = torch.randn(2, 19, embed_dim, device=device)
    ours = run(grouped, [x], lambda m, y: m(y))
    oracle = run(mha.double(), [x.double()], lambda m, y: m(y, y, y, need_weights=False)[0])
    # A gradient of the shared rows is the sum over the heads that share them.
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = oracle[name].chunk(3)
        k, v = (
            t.unflatten(0, (nheads_k, nheads // nheads_k, headdim)).sum(1).flatten(0, 1)
            for t in (k, v)
        )
        oracle[name] = torch.cat((q, k, v))
    assert_same(ours, oracle)


@pytest.mark.parametrize("kdim", [32, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_are_interchangeable(kdim, bias):
    mha = torch_module("cpu", 32, 2, kdim=kdim, bias=bias)
    module = MultiHeadAttention(32, 2, kdim=kdim, bias=bias)
    module.load_state_dict(mha.state_dict())
    back = nn.MultiheadAttention(32, 2, kdim=kdim, bias=bias)
    back.load_state_dict(module.state_dict())
    for name, tensor in mha.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_from_torch_copies_and_keeps_dtype_mode_and_frozen_parameters():
    mha = torch_module("cpu", 32, 2, dtype=torch.float16).eval()
    mha.in_proj_weight.requires_grad_(False)
    module = MultiHeadAttention.from_torch(mha, causal=True, implementation="reference")
    assert not module.training
    assert module.causal
    assert module.implementation == "reference"
    for name, parameter in module.named_parameters():
        source = dict(mha.named_parameters())[name]
        assert parameter.dtype == torch.float16
        assert parameter.requires_grad == (name != "in_proj_weight")
        assert torch.equal(parameter, source)
        assert parameter.data_ptr() != source.data_ptr()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"add_bias_kv": True}, "add_bias_kv=True"),
        ({"add_zero_attn": True}, "add_zero_attn=True"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"batch_first": False}, "batch_first=False"),
    ],
)
def test_from_torch_refuses_what_it_cannot_do(options, named):
    mha = nn.MultiheadAttention(32, 2, **{"batch_first": True, **options})
    with pytest.raises(ValueError, match=named):
        MultiHeadAttention.from_torch(mha)


def test_from_torch_refuses_another_module():
    with pytest.raises(TypeError, match=r"mha must be a torch\.nn\.MultiheadAttention, got Linear"):
        MultiHeadAttention.from_torch(nn.Linear(2, 2))


@pytest.mark.parametrize("strict", [False, True])
def test_appended_keys_are_never_dropped_on_loading(strict):
    outer = nn.Sequential(MultiHeadAttention(32, 2))
    state = nn.Sequential(nn.MultiheadAttention(32, 2, add_bias_kv=True)).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.bias_k: MultiHeadAttention appends no key"):
        outer.load_state_dict(state, strict=strict)


def test_loading_packed_weights_into_separate_ones_fails():
    with pytest.raises(RuntimeError, match="q_proj_weight"):
        MultiHeadAttention(32, 2, kdim=20).load_state_dict(
            nn.MultiheadAttention(32, 2).state_dict()
        )


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((0, 2), {}, "embed_dim must be at least 1, got 0"),
        ((32, 0), {}, "nheads must be at least 1, got 0"),
        ((32, 4, 0), {}, "nheads_k must be at least 1, got 0"),
        ((32, 3), {}, r"embed_dim \(32\) must be a multiple of nheads \(3\)"),
        ((32, 4, 3), {}, r"nheads \(4\) must be a multiple of nheads_k \(3\)"),
        ((32, 4), {"kdim": 0}, "kdim must be at least 1, got 0"),
        ((32, 4), {"vdim": -1}, "vdim must be at least 1, got -1"),
    ],
)
def test_bad_sizes(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*sizes, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(5, 32)], r"query must have shape \(batch, seqlen, embed_dim=32\), got \(5, 32\)"),
        ([(2, 5, 31)], r"query must have shape .* got \(2, 5, 31\)"),
        ([(2, 5, 32), (2, 5, 32), (2, 5, 12)], r"key must have shape .*kdim=20"),
        ([(2, 5, 32), (2, 5, 20), (2, 5, 20)], r"value must have shape .*vdim=12"),
        ([(2, 5, 32), (2, 5, 20), (2, 6, 12)], "v must have k's seqlen 5, got 6"),
        ([(2, 5, 32), (3, 5, 20), (3, 5, 12)], "k must have q's batch size 2, got 3"),
    ],
)
def test_bad_inputs(shapes, message):
    module = MultiHeadAttention(32, 2, kdim=20, vdim=12, implementation="reference")
    with pytest.raises(ValueError, match=message):
        module(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((32.0, 4), {}, "embed_dim must be an int, got float"),
        ((32, True), {}, "nheads must be an int, got bool"),
        ((32, 4, 0.0), {}, "nheads_k must be an int, got float"),  # torch's dropout stands here
        ((32, 4), {"kdim": "32"}, "kdim must be an int, got str"),
        ((32, 4), {"vdim": torch.ones(2)}, "vdim must be an int, got Tensor"),
        ((32, 4), {"bias": None}, "bias must be a bool, got None"),
        ((32, 4), {"causal": 1}, "causal must be a bool, got 1"),
    ],
)
def test_sizes_are_ints_and_flags_bools(sizes, options, message):
    with pytest.raises(TypeError, match=message):
        MultiHeadAttention(*sizes, **options)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_of_another_kind(place):
    module = MultiHeadAttention(32, 2, kdim=20, vdim=12, implementation="reference")
    name = ("query", "key", "value")[place]
    inputs = [torch.zeros(2, 5, size) for size in (32, 20, 12)]
    right = inputs[place]
    for wrong, error, words in (
        (right.tolist(), TypeError, r"must be a torch\.Tensor, got list"),
        (right.double(), TypeError, r"must have the parameters' dtype torch\.float32, got .*64"),
        (right.int(), TypeError, r"must have the parameters' dtype torch\.float32, got .*int32"),
        (right.to("meta"), ValueError, "must be on the parameters' device cpu, got meta"),
        (right.to_sparse(), TypeError, "must be a dense tensor"),
        (torch.nested.nested_tensor(list(right)), TypeError, "must be a dense tensor"),
    ):
        inputs[place] = wrong
        with pytest.raises(error, match=f"{name} {words}"):
            module(*inputs)
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got NoneType"):
        module(None)


def test_a_value_without_a_key_is_refused():
    with pytest.raises(ValueError, match="value needs key"):
        MultiHeadAttention(32, 2)(torch.zeros(1, 2, 32), value=torch.zeros(1, 2, 32))


def test_unknown_implementation_lists_the_known():
    with pytest.raises(ValueError, match="v2"):
        MultiHeadAttention(32, 2, implementation="v9")(torch.zeros(1, 2, 32))


def test_self_attention_projects_once_and_copies_nothing():
    class Spy(MultiHeadAttention):
        def attend(self, q, k, v):
            self.seen = q, k, v
            return super().attend(q, k, v)

    module = Spy(32, 4, 2, implementation="reference")
    module(torch.zeros(2, 7, 32))
    q, k, v = module.seen
    assert (q.shape, k.shape, v.shape) == ((2, 7, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    assert len({t.untyped_storage().data_ptr() for t in module.seen}) == 1
    assert [t.stride(1) for t in module.seen] == [64, 64, 64]


def test_softmax_scale_reaches_the_attention():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 32)
    module = MultiHeadAttention(32, 2, softmax_scale=0.0, implementation="reference")
    out = module(x)  # every key weighs the same, so every query gets the same
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    module.softmax_scale = None
    assert not torch.allclose(module(x), out)


def test_parameters_are_drawn_as_by_torch():
    torch.manual_seed(0)
    module = MultiHeadAttention(256, 4)
    in_proj, out_proj = module.in_proj_weight.detach(), module.out_proj.weight.detach()
    bound = (6 / (256 + 3 * 256)) ** 0.5
    assert float(in_proj.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(in_proj.std()) == pytest.approx(bound / 3**0.5, rel=2e-2)
    assert float(out_proj.abs().max()) == pytest.approx(256**-0.5, rel=1e-3)
    assert not module.in_proj_bias.any()
    assert not module.out_proj.bias.any()


@every_differentiable_row
def test_autocast(implementation, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    module = MultiHeadAttention(32, 2, causal=True, implementation=implementation, device=device)
    x = torch.randn(1, 20, 32, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out = module(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert module.in_proj_weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.02)


@every_differentiable_row
def test_compiles_to_one_graph(implementation, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    torch.compiler.reset()
    torch.manual_seed(0)
    module = MultiHeadAttention(32, 2, 1, causal=True, implementation=implementation, device=device)
    inputs = [torch.randn(2, n, 32, device=device) for n in (9, 20)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager = run(module, inputs, lambda m, *xs: m(*xs))
    module.zero_grad()
    ours = run(module, inputs, lambda _, *xs: compiled(*xs))
    assert_same(ours, {name: t.double() for name, t in eager.items()})
