"""DiT against a second implementation, and what is said of it in the paper."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_dit import reference, sincos
from torch import Tensor
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusionkit import (
    DDIM,
    EDMSDE,
    VPSDE,
    ClassifierFreeGuidance,
    DDPMChain,
    EDMModel,
    EpsModel,
    HybridLoss,
    PCSampler,
    ScoreMatching,
    StepLabel,
    drop_conditions,
)
from diffusionkit.networks import DiT
from diffusionkit.networks.dit import PUBLISHED
from diffusionkit.networks.positions import rotary_positions, rotated, sincos_positions

TINY: dict[str, Any] = {"channels": 2, "width": 24, "depth": 2, "heads": 2}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "default": ((4, 6), {}),
    "classes": ((4, 6), {"num_classes": 4}),
    "condition": ((4, 6), {"condition_features": 3}),
    "learned variance": ((4, 4), {"learn_sigma": True, "out_channels": 3}),
    "data range": ((4, 4), {"data_range": (0.0, 255.0), "mlp_ratio": 1.5}),
    "oblong patches": ((6, 8), {"patch_size": (3, 2), "num_classes": 4}),
    "series": ((9,), {"dims": 1, "patch_size": 3}),
    "volumes": ((4, 2, 6), {"dims": 3, "patch_size": [2, 1, 3]}),
    "channels without position": ((2, 4, 2), {"dims": 3, "width": 20}),
    "rotary": ((4, 6), {"positions": "rotary"}),
    "rotary series": ((8,), {"dims": 1, "positions": "rotary", "patch_size": 1}),
    "rotary volumes": ((4, 2, 6), {"dims": 3, "positions": "rotary", "heads": 3}),
    "features not rotated": ((4, 6), {"positions": "rotary", "width": 20}),
    "everything": (
        (4, 6),
        {"positions": "rotary", "num_classes": 4, "condition_features": 3, "learn_sigma": True},
    ),
}
cases = pytest.mark.parametrize("case", CASES)
slow = pytest.mark.slow
some = pytest.mark.parametrize("case", ["classes", "everything"])


def fill(net: DiT) -> DiT:
    """Draw every parameter, so that no part is negligible."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return net


def tiny(case: str, **more: Any) -> DiT:
    return fill(DiT(**TINY | CASES[case][1] | more).double().eval())


def arguments(case: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape, options = CASES[case]
    made = {
        "x": torch.randn(batch, 2, *shape, generator=generator, dtype=dtype),
        "noise_label": torch.tensor([0.0, 3.5, 999.0, -0.4], dtype=dtype)[:batch],
    }
    if "num_classes" in options:
        made["class_labels"] = torch.tensor([3, 0, 2, 1])[:batch]
    if "condition_features" in options:
        made["condition"] = torch.randn(batch, 3, generator=generator, dtype=dtype)
    return made


@cases
def test_against_a_second_implementation(case: str) -> None:
    net, inputs = tiny(case), arguments(case)
    expected = reference(net, **inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(**inputs), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    pairs=st.integers(3, 8),
    seed=st.integers(0, 9),
)
def test_rotated_products_depend_on_differences_of_positions(grid, pairs, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(0, dtype=torch.float64)
    q, k = torch.randn(2, 2 * pairs, generator=generator, dtype=torch.float64)
    table = rotary_positions(grid, 2 * pairs, like)
    n = len(table[0])
    products = rotated(q.expand(n, -1), *table) @ rotated(k.expand(n, -1), *table).t()
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(n, -1)
    differences = places[:, None] - places[None]
    found: dict[tuple[int, ...], float] = {}
    for i in range(n):
        for j in range(n):
            value = float(products[i, j])
            difference = tuple(differences[i, j].tolist())
            assert found.setdefault(difference, value) == pytest.approx(value, abs=1e-12)
    assert found[(0,) * len(grid)] == pytest.approx(float(q @ k), abs=1e-12)
    if len(found) > 1:
        assert len({round(value, 9) for value in found.values()}) > 1


def test_positions_are_in_the_order_of_the_patches() -> None:
    table = sincos_positions((2, 3), 12, torch.empty(0, dtype=torch.float64))
    places = [(i, j) for i in range(2) for j in range(3)]
    expected = torch.stack([sincos(place, 12) for place in places])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-15)


def test_positions_tell_patches_apart() -> None:
    for positions in ("sincos", "rotary"):
        net = fill(DiT(1, width=24, depth=1, heads=2, positions=positions).double())
        x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        x[..., :2, :2] = 1.0
        t = torch.ones(1)
        moved = net(x.roll(2, 3), t).roll(-2, 3)
        assert (net(x, t) - moved).abs().max() > 1e-2, positions


# Size, patch: parameters, counted in the released code, and multiply-adds of a forward pass at
# 4 x 32 x 32 in units of 10^9, which the paper calls Gflops (table 4).
SIZES = {
    "S/2": (32_865_056, 6.06), "S/4": (32_920_448, 1.41), "S/8": (33_142_016, 0.36),
    "B/2": (130_315_808, 23.01), "B/4": (130_426_496, 5.56), "B/8": (130_869_248, 1.42),
    "L/2": (457_840_672, 80.71), "L/4": (457_988_224, 19.70), "L/8": (458_578_432, 5.01),
    "XL/2": (674_834_720, 118.64), "XL/4": (675_000_704, 29.05), "XL/8": (675_664_640, 7.39),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_size_of_the_released_ones(name: str) -> None:
    with torch.device("meta"):
        net = DiT.published(name)
    assert sum(p.numel() for p in net.parameters()) == SIZES[name][0]
    assert net.config["heads"] == {384: 6, 768: 12, 1024: 16, 1152: 16}[net.config["width"]]


@pytest.mark.parametrize(
    "name", [n if n in ("S/4", "XL/2") else pytest.param(n, marks=slow) for n in PUBLISHED]
)
def test_published_networks_cost_what_the_paper_says(name: str) -> None:
    with torch.device("meta"):
        net = DiT.published(name).eval()
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert net(*inputs).shape == (1, 8, 32, 32)
    # The counter has two operations for a multiply-add, the paper one.
    assert counter.get_total_flops() / 2e9 == pytest.approx(SIZES[name][1], rel=1e-3, abs=6e-3)


def test_options_replace_the_published_ones() -> None:
    with torch.device("meta"):
        net = DiT.published("S/8", num_classes=None, depth=1, dims=3, positions="rotary")
    assert net.config["patch_size"] == 8
    assert (net.config["num_classes"], len(net.blocks), net.dims) == (None, 1, 3)


def test_initialization_is_the_published_one() -> None:
    torch.manual_seed(0)
    net = DiT(3, width=96, depth=2, heads=4, num_classes=50, condition_features=4)
    zero = {name for name, p in net.named_parameters() if not p.any()}
    biases = {n for n, _ in net.named_parameters() if n.endswith("bias")}
    gates = {n for n, _ in net.named_parameters() if "modulation" in n}
    assert zero == biases | gates | {"head.linear.weight"}
    for name in ("linear_1", "linear_2", "classes"):
        weight = net.get_submodule(f"embedding.{name}").weight.detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    for name in ("input", "blocks.0.attention.qkv", "blocks.1.feed_forward.linear_1"):
        weight = net.get_submodule(name).weight.detach()
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier, of the patch as a vector
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_new_network_is_zero_and_its_blocks_change_nothing() -> None:
    net = DiT(1, width=24, depth=2, heads=2)
    assert not net(torch.randn(2, 1, 4, 4), torch.tensor([1.0, 2.0])).any()
    tokens = torch.randn(2, 4, 24)
    assert torch.equal(net.blocks[0](tokens, torch.randn(2, 24), None), tokens)


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("everything", False),
        pytest.param("classes", False, marks=slow),
        pytest.param("classes", True, marks=slow),
        pytest.param("everything", True, marks=slow),
    ],
)
def test_compiles_in_one_graph(case: str, recompute: bool) -> None:
    torch.compiler.reset()
    net, inputs = tiny(case, activation_checkpointing=recompute), arguments(case)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager" if recompute else "eager")
    torch.testing.assert_close(compiled(**inputs), net(**inputs))


@slow
def test_is_exported_with_any_batch_size() -> None:
    inputs = arguments("everything")
    batch = {0: Dim("batch", max=64)}
    graph = export(tiny("everything"), (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch))
    other = arguments("everything", batch=4)
    net = tiny("everything")
    torch.testing.assert_close(graph.module()(**other), net(**other))


def gradients(net: DiT, inputs: dict[str, Tensor]) -> list[Tensor]:
    net.zero_grad()
    x = inputs["x"].clone().requires_grad_()
    net(**inputs | {"x": x}).square().mean().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


def stored(net: DiT, inputs: dict[str, Tensor]) -> int:
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(**inputs)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return sum(n for pointer, n in sizes.items() if pointer not in own)


@some
def test_recomputing_changes_no_gradient_and_stores_less(case: str) -> None:
    inputs = arguments(case)
    plain, recomputing = (
        tiny(case, activation_checkpointing=flag, depth=4).train() for flag in (False, True)
    )
    pairs = zip(gradients(plain, inputs), gradients(recomputing, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert stored(recomputing, inputs) < 0.3 * stored(plain, inputs)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm().detach() / expected.norm().detach())


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case: str, dtype: torch.dtype) -> None:
    net, inputs = tiny(case), arguments(case)
    expected = net(**inputs)
    inputs = {n: v if v.dtype == torch.int64 else v.to(dtype) for n, v in inputs.items()}
    label = arguments(case)["noise_label"].float()
    got = copy.deepcopy(net).to(dtype)(**inputs | {"noise_label": label})
    assert got.dtype == dtype
    assert 0 < relative(got, expected) < (0.01 if dtype == torch.float16 else 0.06)
    with pytest.raises(TypeError, match="noise_label: expected float32"):
        net.to(dtype)(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        single = {n: v.float() if v.dtype == dtype else v for n, v in inputs.items()}
        got = net.float()(**single | {"noise_label": label})
    assert got.dtype == torch.bfloat16
    assert 0 < relative(got, expected) < 0.06


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_tokens_stay_in_single_precision_under_autocast(positions: Any) -> None:
    """Rounded after every block, a deep network would lose digits with its depth."""
    net = fill(DiT(1, width=24, depth=3, heads=2, positions=positions))
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0], out]))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 1, 4, 4), torch.ones(2)).dtype == torch.bfloat16
    assert {tokens.dtype for tokens in seen} == {torch.float32}


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_tables_made_under_a_transform_serve_later_calls(positions: Any) -> None:
    net = fill(DiT(1, width=24, depth=1, heads=2, patch_size=1, positions=positions))
    x, label = torch.randn(2, 1, 3, 7), torch.ones(2)
    expected = copy.deepcopy(net).double()(x.double(), label)
    with sdpa_kernel(SDPBackend.MATH):
        jvp(lambda x: net(x, label), (x,), (x,))
        vmap(lambda x: net(x[None], label[:1]))(x)
    net(x, label).square().mean().backward()
    torch.testing.assert_close(net(x, label).double(), expected, rtol=1e-4, atol=1e-4)


def test_noise_labels_are_not_rounded_to_the_dtype_of_the_network() -> None:
    net = fill(DiT(1, width=24, depth=1, heads=2)).bfloat16()
    x = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)
    a, b = net(x, torch.tensor([997.0, 998.0]))  # one number in bfloat16
    assert not torch.equal(a, b)


@some
def test_derivatives(case: str) -> None:
    net, inputs = tiny(case), arguments(case, batch=2)
    x = inputs.pop("x")
    v = torch.randn_like(x)
    h = 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = jvp(lambda x: net(x, **inputs), (x,), (v,))
        with torch.no_grad():
            expected = (net(x + h * v, **inputs) - net(x - h * v, **inputs)) / (2 * h)
        torch.testing.assert_close(out, net(x, **inputs))
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)

        parameters = {n: p.detach() for n, p in net.named_parameters()}

        def of_one(sample: dict[str, Tensor]) -> dict[str, Tensor]:
            one = {name: value[None] for name, value in sample.items()}
            return grad(lambda p: functional_call(net, p, (), one).square().sum())(parameters)

        samples = inputs | {"x": x}
        got = vmap(of_one)(samples)
    for i in range(2):
        net.zero_grad()
        net(**{name: value[i : i + 1] for name, value in samples.items()}).square().sum().backward()
        for name, value in got.items():
            torch.testing.assert_close(value[i], net.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("positions", "size"), [("rotary", (8,)), ("sincos", (4, 8)), ("rotary", (4, 2, 4))]
)
def test_learns(positions: Any, size: tuple[int, ...]) -> None:
    """Data of one random field: the loss falls far below 1, that of predicting no noise."""
    torch.manual_seed(0)
    net = DiT(1, dims=len(size), width=32, depth=2, heads=2, positions=positions)
    model = EpsModel(net, VPSDE())
    data = torch.randn(1, 1, *size).expand(64, 1, *size)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    objective = ScoreMatching()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(model, data).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9
    assert sum(losses[-10:]) / 10 < 0.3


def test_classes_and_no_class_guide_samples() -> None:
    """A network of two classes and a third for none, after a few steps on two constants."""
    torch.manual_seed(0)
    net = DiT(1, width=32, depth=1, heads=2, num_classes=3)
    model = EDMModel(net, EDMSDE(sigma_max=10.0), sigma_data=1.0)
    labels = torch.arange(64) % 2
    data = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(64, 1, 4, 4)
    optimizer, objective = torch.optim.Adam(model.parameters(), 3e-3), ScoreMatching()
    for _ in range(60):
        optimizer.zero_grad()
        given = drop_conditions(labels, 2, 0.2)
        objective(model, data, class_labels=given).mean().backward()
        optimizer.step()
    guided = ClassifierFreeGuidance(model, 1.5, null={"class_labels": 2})
    x = PCSampler(guided, DDIM(), steps=8)((8, 1, 4, 4), class_labels=torch.arange(8) % 2)
    means = x.mean((1, 2, 3))
    assert (means[1::2] > 0.5).all()
    assert (means[::2] < -0.5).all()


def test_a_learned_variance_is_trained_by_the_hybrid_loss() -> None:
    chain = DDPMChain.linear(50)
    net = fill(DiT(1, width=24, depth=1, heads=2, learn_sigma=True))
    model = EpsModel(net, chain, label=StepLabel(50), variance="learned_range")
    loss = HybridLoss()(model, torch.linspace(-1, 1, 256).view(4, 1, 8, 8))
    loss.mean().backward()
    assert net.head.linear.weight.grad.view(2, 2, 2, 24)[..., 1, :].abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected an integer >= 1, got 0"),
        ({"depth": 1.0}, TypeError, "depth: expected an integer, got float"),
        ({"dims": 4}, ValueError, "dims: expected an integer <= 3, got 4"),
        ({"heads": 5}, ValueError, "heads: expected a divisor of width=24, got 5"),
        ({"positions": "learned"}, ValueError, "positions: expected one of 'sincos', 'rotary'"),
        (
            {"positions": "rotary", "heads": 12},
            ValueError,
            "heads: expected heads of an even number of features, at least 4, .* got 12 of 2",
        ),
        ({"patch_size": 0}, ValueError, "patch_size: expected an integer >= 1, got 0"),
        ({"patch_size": (2,)}, ValueError, "patch_size: expected one integer or 2, got 1 of them"),
        ({"patch_size": "22"}, TypeError, "patch_size: expected a sequence, got str"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio: expected at least one of 24 channels"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"data_range": (1.0, 1.0)}, ValueError, "data_range: expected finite low < high"),
        ({"hidden_size": 8}, TypeError, "hidden_size: .*; use width="),
        ({"num_heads": 8}, TypeError, "; use heads="),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiT(**TINY | options)


def test_call_errors() -> None:
    net = tiny("everything")
    inputs = arguments("everything")
    for changed, error, message in [
        ({"x": torch.randn(3, 2, 4, 5)}, ValueError, r"x: .* divisible by .* \(2, 2\), got \(4, 5"),
        ({"x": torch.randn(3, 2, 4)}, ValueError, r"x: expected shape \(B, 2, H, W\)"),
        ({"condition": None}, TypeError, r"condition: expected a tensor \(B, 3\)"),
        ({"class_labels": None}, TypeError, "class_labels: expected a tensor"),
        ({"class_labels": torch.full((3,), 4)}, ValueError, r"class_labels: .* one more class"),
    ]:
        with pytest.raises(error, match=message):
            net(**inputs | changed)
    with pytest.raises(ValueError, match=r"name: expected one of 'S/2', .*, got 'M/2'"):
        DiT.published("M/2")
