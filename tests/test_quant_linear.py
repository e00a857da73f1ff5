"""QuantLinear: the product, its gradient, its state, and what torch does with modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bitwright import ops, schemes
from bitwright.hf import QuantLinear
from bitwright.hf.shared import Shared
from bitwright.spec import InputError, QTensor

SCHEMES = (
    "int4-g32", "int2-g16-asym", "int3-g64-asym-fp16", "int8-channel", "nf4-g32-fp32", "mxfp4",
    "nvfp4", "int4-g32-offset", "int4-g16-offset-fp16-8x6", "int5-tensor", "bfp4-g16-fp32",
)  # fmt: skip
N, K = 40, 96


def weight(scheme: str, order: bool = False, n: int = N, k: int = K) -> QTensor:
    wanted, rng = schemes.parse(scheme), np.random.default_rng(0)
    W = rng.standard_normal((n, k)).astype(np.float32) * np.float32(0.1)
    q = ops.encode(W, *ops.fit(W, wanted), wanted)
    places = rng.permutation(k).astype(np.int32) if order else None
    return QTensor(q.codes, q.scales, q.zeros, wanted, q.global_scale, q.steps, places)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    return bool((a.float() - b.float()).abs().max() <= limit * b.float().abs().max())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_products_are_those_of_the_dequantized_weight(scheme, order):
    """float32 to rounding; bfloat16 and float16 to theirs."""
    q, bias = weight(scheme, order), inputs(N)
    layer = QuantLinear.of(q, bias, "exact")
    W = torch.from_numpy(ops.decode(q))
    assert torch.equal(layer.dequantize(), W)
    x = inputs(2, 3, K)
    assert close(layer(x), nn.functional.linear(x, W, bias), 1e-5)
    for dtype, limit in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        y = QuantLinear.of(q, bias.to(dtype), "exact")(x.to(dtype))
        assert y.dtype == dtype
        assert close(y, nn.functional.linear(x.to(dtype).float(), W, bias), limit)


@pytest.mark.parametrize("k", [4096, 14336])
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_exact_products_of_wide_rows(k, tokens):
    """Against float64, and the product that torch makes of the dequantized weight."""
    q, x = weight("int4-g128", n=100, k=k), inputs(tokens, k)
    y, W = QuantLinear.of(q, mode="exact")(x), torch.from_numpy(ops.decode(q))
    assert close(y, x @ W.T, 1e-5)
    assert close(y, (x.double() @ W.double().T), 1e-5)


def test_fast_products_stay_within_the_rounding_of_the_activations():
    """|error| <= sum |w| step / 2 per group, step = max |x| / 127."""
    q, x = weight("int4-g32"), inputs(5, K)
    layer, W = QuantLinear.of(q, mode="fast"), torch.from_numpy(ops.decode(q))
    for activations, groups in (("group", K // 32), ("token", 1)):
        layer.set_mode("fast", activations)
        steps = x.reshape(5, groups, -1).abs().amax(2) / 127
        room = steps @ W.abs().reshape(N, groups, -1).sum(2).T / 2
        assert ((layer(x) - x @ W.T).abs() <= 1.01 * room + 1e-5).all()


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "nvfp4", "int4-g16-offset-fp16-8x6"])
def test_gradients_flow_through_the_weight_to_the_input(scheme):
    q, bias = weight(scheme, order=True), inputs(N)
    layer, W = QuantLinear.of(q, bias, "exact"), torch.from_numpy(ops.decode(q))
    layer.bias.requires_grad_()
    x, twin = inputs(4, K).requires_grad_(), inputs(4, K).requires_grad_()
    grad = inputs(4, N)
    layer(x).backward(grad)
    nn.functional.linear(twin, W).backward(grad)
    assert close(x.grad, twin.grad, 1e-5)
    assert torch.allclose(layer.bias.grad, grad.sum(0))


def test_the_op_keeps_to_torchs_rules():
    layer = QuantLinear.of(weight("int4-g32"), mode="exact")
    x = inputs(3, K).requires_grad_()
    args = (x, layer.panels, None, "int4-g32", N, K, 1.0, "exact", "group")
    torch.library.opcheck(torch.ops.bitwright.linear.default, args)


class Adapted(nn.Module):
    """A low-rank adapter on top of a frozen layer."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_adapters_train_on_top_and_the_weight_stays():
    torch.manual_seed(0)
    second = QuantLinear.of(weight("int4-g32", n=8, k=N))
    model = nn.Sequential(Adapted(QuantLinear.of(weight("int4-g32"))), nn.Tanh(), second)
    x, y = inputs(32, K), inputs(32, 8)
    before = model[0].layer.dequantize()
    names = {name for name, _ in model.named_parameters()}
    assert names == {"0.down.weight", "0.up.weight"}
    step = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model[0].layer.dequantize(), before)


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_state_dict_is_the_file(scheme):
    """Names, types and bytes of format bitwright; into an empty layer and into a full one."""
    from_file = QuantLinear.of(weight(scheme, order=True), inputs(N))
    state = from_file.state_dict()
    named = {name: (ops.as_numpy(t).dtype, tuple(t.shape)) for name, t in state.items()}
    assert named == {"bias": (np.dtype(np.float32), (N,)), **from_file.layout()}
    empty = QuantLinear(K, N, scheme, bias=True, ordered=True)
    empty.load_state_dict(state)
    assert empty.packed
    full = QuantLinear.of(weight(scheme, order=True, n=N), inputs(N))
    full.load_state_dict(state)
    for layer in (empty, full, copy.deepcopy(from_file)):
        again = layer.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
        assert torch.equal(layer(inputs(2, K)), from_file(inputs(2, K)))


def test_a_state_that_lacks_something_changes_nothing():
    layer = QuantLinear.of(weight("int4-g32"))
    before, state = layer.dequantize(), layer.state_dict()
    for broken in ({k: v for k, v in state.items() if k != "scales"}, {}):
        with pytest.raises(RuntimeError, match="scales"):
            layer.load_state_dict(broken)
        assert torch.equal(layer.dequantize(), before)
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        layer.load_state_dict({**state, "codes": state["codes"][:-1]})
    assert torch.equal(layer.dequantize(), before)
    with pytest.raises(InputError, match=r"wanted n and k in weight.shape"):
        layer.load_state_dict({**state, "shape": torch.zeros(2, dtype=torch.int64)})


def test_casting_a_model_leaves_the_weight_alone():
    layer = QuantLinear.of(weight("nf4-g32-fp32"), inputs(N))
    W = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), W)
    assert torch.equal(
        layer.half().state_dict()["scales"],
        QuantLinear.of(layer.quantized()).state_dict()["scales"],
    )


@pytest.mark.parametrize("order", [False, True])
def test_compiled_in_one_graph(order):
    layer = QuantLinear.of(weight("int4-g32", order), inputs(N), "exact")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(3, K)
    assert torch.equal(compiled(x), layer(x))
    trained, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(trained).sum().backward()
    layer(twin).sum().backward()
    assert torch.equal(trained.grad, twin.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_by_inductor_between_other_layers():
    first, last = (QuantLinear.of(weight("int4-g32", False), inputs(N), "exact") for _ in range(2))
    middle = torch.nn.Linear(N, K)
    model = torch.nn.Sequential(first, torch.nn.SiLU(), middle, last)
    x = inputs(3, K)
    with torch.inference_mode():
        want = model(x)
        got = torch.compile(model, fullgraph=True, backend="inductor")(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_it_cannot_take_is_one_sentence():
    layer = QuantLinear.of(weight("int4-g32"))
    for x in (inputs(3, K - 1), torch.empty(3, K, device="meta")):
        with pytest.raises(InputError, match=r"wanted activations \(..., 96\) on the CPU, got"):
            layer(x)
    with pytest.raises(InputError, match=r"wanted mode fast or exact .* got 'slow' and 'group'"):
        layer.set_mode("slow")
    with pytest.raises(InputError, match=r"wanted a weight \(40, 96\) in int4-g32, got \(8, 96\)"):
        layer.hold(weight("int4-g32", n=8))


@pytest.mark.parametrize("inference", [False, True])
def test_layers_of_one_input_never_take_products_of_another(inference):
    """Another tensor, and the same one changed in place, between the one layer and the other."""
    first, second = (QuantLinear.of(weight(s), mode="exact") for s in ("int4-g32", "int2-g16-asym"))
    alone = copy.deepcopy(second)
    first.shared = second.shared = Shared([first, second])
    with torch.inference_mode(inference):
        x, other = inputs(3, K), inputs(3, K) + 1.0
        first(x)
        assert torch.equal(second(other), alone(other))
        first(x)
        assert torch.equal(second(x), alone(x))
        first(x)
        x.mul_(2.0)
        assert torch.equal(second(x), alone(x))
