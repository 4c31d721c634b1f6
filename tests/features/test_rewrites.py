"""Rewrites of a block's graph: what they find in stock blocks, and that the result is the same."""

from __future__ import annotations

import copy
import operator
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from exact import relative
from tiny import TINY, build, same, tensors
from tiny.flux import load_ip_adapter
from torch.utils import _pytree as pytree

from diffusers_accel import CompileConfig, LinearConfig, accelerate
from diffusers_accel.features.compile import rewrites
from diffusers_accel.kernels.linear import formats
from diffusers_accel.kernels.linear.epilogue import concat_linear, linear_gelu
from diffusers_accel.kernels.linear.row_quantization import TYPES

COUNTED = CompileConfig(backend="counting rewritten graphs", rewrites=True)


@pytest.fixture
def seen(monkeypatch, on_cpu):
    """A backend behind the rewrites that counts the operators in its graphs."""
    found: Counter[str] = Counter()

    def backend(module, inputs, **_):
        found["graphs"] += 1
        found.update(node.target.name() for node in module.graph.nodes if "diffusers_accel" in str(node.target))
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.diffusers_accel.residual_norm.default):
            vectors = (node.args[place] for place in (2, 5, 6))
            found["residual_norm, a vector a row"] += any(
                len(given) == 1 and given[0].meta["example_value"].shape[1] > 1 for given in vectors
            )
        found.update(["rms_norm"] * len(module.graph.find_nodes(op="call_function", target=torch.rms_norm)))
        return module.forward

    torch._dynamo.register_backend(backend, name=COUNTED.backend)
    yield found
    torch._dynamo.backends.registry._COMPILER_FNS.pop(COUNTED.backend)
    rewrites.rewritten.cache_clear()


def counted(seen, *names):
    return tuple(seen[name if name == "rms_norm" else f"diffusers_accel::{name}"] for name in names)


@pytest.mark.parametrize(
    ("name", "gelu", "parts"),
    [("flux", 3, 1), ("wan", 1, 0), ("qwen", 2, 0), ("sd3", 2, 0), ("cosmos", 0, 0), ("flux2", 0, 1)],
)
def test_stock_blocks(name, gelu, parts, seen):
    """Of a graph for each class of blocks: their feed-forwards, and FLUX's layers of two tensors. Cosmos has GELU in
    its exact form, FLUX.2 a gated one."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=2)
    accelerate(pipe, compile=COUNTED)
    torch.testing.assert_close(entry.run(pipe, steps=2), stock, atol=1e-4, rtol=1e-4)
    graphs = counted(seen, "linear_gelu", "concat_linear")
    assert graphs >= (gelu, parts) and bool(graphs[0]) == bool(gelu) and bool(graphs[1]) == bool(parts), seen


@pytest.mark.parametrize("name", ["flux", "flux2", "wan", "wan22", "qwen", "ltx2", "sd3", "cosmos", "cosmos-predict25"])
def test_norms_and_rotations(name, seen):
    """No norm of a block and no rotation is left: all are in a pass over rows or in the call of attention. (SD3's tiny
    model has no QK-norm.)"""
    entry, pipe = TINY[name], build(name)
    stock = tensors(entry.run(pipe, steps=2))
    accelerate(pipe, attention="sdpa", compile=COUNTED)
    for found, expected in zip(tensors(entry.run(pipe, steps=2)), stock, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    normed, fused, left, rotations, norms = counted(
        seen, "residual_norm", "fused_qk_norm_rope_attention", "attention", "apply_rope", "rms_norm"
    )
    assert normed >= 3 and not rotations and not norms, seen
    assert (fused == 0 and left) if name == "sd3" else (fused and not left), seen


def test_packed_sequences(seen):
    """Cosmos3's streams have no batch: their norms, with the sums before them, are passes all the same."""
    entry, pipe = TINY["cosmos3"], build("cosmos3")
    stock = tensors(entry.run(pipe, steps=2))
    accelerate(pipe, attention="sdpa", compile=COUNTED)
    for found, expected in zip(tensors(entry.run(pipe, steps=2)), stock, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # Two before attention and two after, and four of the heads, which are too short at real sizes.
    assert counted(seen, "residual_norm", "rms_norm") == (8 * seen["graphs"], 0), seen


@pytest.mark.parametrize("name", ["wan-ti2v", "ltx2-i2v"])
def test_modulations_of_every_token(name, seen):
    """Where every token has a time step of its own, the sum of its embedding and the block's table is never written to
    memory: the passes read both."""
    entry, pipe = TINY[name], build(name)
    stock = tensors(entry.run(pipe, steps=2))
    accelerate(pipe, compile=COUNTED)
    for found, expected in zip(tensors(entry.run(pipe, steps=2)), stock, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert counted(seen, "residual_norm")[0] >= 2 and not seen["residual_norm, a vector a row"], seen


@pytest.fixture
def beside_stock(seen, monkeypatch):
    """Runs each graph beside the one that it was rewritten from, on the same tensors: how far what they give is apart,
    by graph."""
    graphs, errors = [], []
    stock_call, lookup = rewrites.REWRITES, torch._dynamo.lookup_backend

    def rewrite(graph):
        graphs.append(copy.deepcopy(graph))
        stock_call(graph)

    def backend(module, inputs, **options):
        stock, rewritten = (
            torch.fx.GraphModule(module, graphs.pop()),
            lookup(COUNTED.backend)(module, inputs, **options),
        )

        def both(*args):
            expected, found = stock(*args), rewritten(*args)
            errors.append(max(map(relative, pytree.tree_leaves(found), pytree.tree_leaves(expected))))
            return found

        return both

    monkeypatch.setattr(rewrites, "REWRITES", rewrite)
    monkeypatch.setattr(
        torch._dynamo, "lookup_backend", lambda name: backend if name == COUNTED.backend else lookup(name)
    )
    return errors


# A value near a midpoint is rounded the other way where a sum has come in another order: to the next number of its
# type, which is 1/16 to 1/8 of it away in e4m3. Where that befalls one value in 1,700, a layer's input is off by
# (1/8) / 1,700**0.5; noise of 1e-6 does less. Rounding that is left out, or done twice, moves all values, by 0.026 in
# the mean. (A whole request multiplies one such value to several percent.)
FLIPPED = 0.003


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "kind"),
    # Both formats on two families, one on each other.
    [
        *((name, kind) for name in ("flux", "wan") for kind in ("fp8", "int8")),
        ("flux2", "int8"), ("qwen", "fp8"), ("ltx2", "fp8"), ("cosmos3", "int8"),
    ],
)  # fmt: skip
def test_rounded_in_passing(name, kind, seen, beside_stock):
    """A norm or an activation that only quantized layers read rounds its result, once for all of them."""
    entry, pipe = TINY[name], build(name)
    accelerate(pipe, attention="sdpa", linear=LinearConfig(algo=kind, smallest=0), compile=COUNTED)
    entry.run(pipe, steps=2)
    assert beside_stock and max(beside_stock) < FLIPPED
    count = sum(type(module).__name__.startswith(kind.capitalize()) for module in pipe.transformer.modules())
    alone, passing = counted(seen, "quantize_rows", "concat_quantize")
    assert passing and alone + passing < count, (seen, count)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends(backend, monkeypatch, on_cpu):
    """Where they are asked for, rewritten graphs run without inductor."""
    entry, pipe, made = TINY["flux"], build("flux"), Counter()
    put = rewrites.rows.put

    def counted(graph, before, target, *args):
        made[str(target)] += 1
        return put(graph, before, target, *args)

    monkeypatch.setattr(rewrites.rows, "put", counted)
    stock = entry.run(pipe, steps=2)
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend=backend))
    assert same(entry.run(pipe, steps=2), stock) and not made
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend=backend, rewrites=True))
    torch.testing.assert_close(entry.run(pipe, steps=2), stock, atol=1e-4, rtol=1e-4)
    assert made["diffusers_accel.residual_norm.default"] >= 3


def test_what_is_left_as_it_is(seen):
    """A product or a concatenation that something else reads too, another form, another dimension."""
    weight, bias = torch.randn(6, 4), torch.randn(6)
    tall = torch.randn(6, 8)

    def block(x):
        product = F.linear(x, weight, bias)
        both = torch.cat([x, x], -1)
        stacked = torch.cat([x, x], 0)
        wide = F.linear(both, tall, bias), F.linear(stacked, weight, bias)
        exact, plain = F.gelu(F.linear(x, weight, bias)), F.gelu(F.linear(x, weight), approximate="tanh")
        return product, F.gelu(product, approximate="tanh"), both, *wide, exact, plain

    x = torch.randn(5, 4)
    with torch.no_grad():
        found = torch.compile(block, backend=rewrites.rewritten(COUNTED.backend))(x)
    assert all(map(torch.equal, found, block(x))) and not +seen - Counter(graphs=1)


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3"])
def test_few_rows(name, seen):
    """The modulation of all tokens comes from one row in every block: SiLU and product in one operator."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=2)
    accelerate(pipe, compile=COUNTED)
    torch.testing.assert_close(entry.run(pipe, steps=2), stock, atol=1e-4, rtol=1e-4)
    assert counted(seen, "skinny_linear")[0] >= 2


def test_processors_with_weights(seen):
    """FLUX's IP-Adapter processor is a module with weights of its own, which stay where they are."""
    entry, pipe = TINY["flux"], build("flux")
    load_ip_adapter(pipe)
    processor, names = pipe.transformer.transformer_blocks[0].attn.processor, set(pipe.transformer.state_dict())
    given = {"ip_adapter_image_embeds": [torch.randn(1, 1, 24)]}
    given["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 24)]
    stock = entry.run(pipe, steps=2, **given)
    accelerate(pipe, attention="sdpa", compile=COUNTED)
    assert pipe.transformer.transformer_blocks[0].attn.processor is processor
    assert set(pipe.transformer.state_dict()) == names
    torch.testing.assert_close(entry.run(pipe, steps=2, **given), stock, atol=1e-4, rtol=1e-4)
    assert counted(seen, "residual_norm")[0] and counted(seen, "fused_qk_norm_rope_attention")[0], (
        "single-stream blocks have stock ones"
    )


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("rows", [2, 5])
def test_few_rows_of_8_bits(rows, kind, on_cpu):
    """A graph as Fp8Linear or Int8Linear writes it on a GPU: a few rows are not rounded, more are."""
    operators, graph = torch.ops.diffusers_accel, torch.fx.Graph()
    x, weight, bias = torch.randn(rows, 32), torch.randn(48, 32), torch.randn(48)
    data, scale = formats.quantize_rows(weight, TYPES[kind])
    given = {"x": x, "data": data, "scale": scale, "bias": bias}
    nodes = {name: graph.placeholder(name) for name in given}
    for name, node in nodes.items():
        node.meta["example_value"] = given[name]
    silu = graph.call_function(F.silu, (nodes["x"],))
    silu.meta["example_value"] = x
    rounding = graph.call_function(operators.quantize_rows.default, (silu, kind))
    values, scales = (graph.call_function(operator.getitem, (rounding, place)) for place in (0, 1))
    target = torch._scaled_mm if kind == "e4m3" else operators.int8_linear.default
    if kind == "e4m3":
        transposed = [graph.call_method("t", (nodes[name],)) for name in ("data", "scale")]
        product = graph.call_function(target, (values, transposed[0], scales, transposed[1]), {"bias": nodes["bias"]})
    else:
        args = (values, scales, nodes["data"], nodes["scale"], nodes["bias"], torch.float32)
        product = graph.call_function(target, args)
    product.meta["example_value"] = torch.empty(rows, 48)
    graph.output(product)
    rewrites.linear.rewrite(graph)
    left = graph.find_nodes(op="call_function", target=target)
    assert bool(left) == (rows > 4)
    if not left:
        found = torch.fx.GraphModule({}, graph)(**given)
        expected = F.silu(x.double()) @ (data.double() * scale.double()).T + bias.double()
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
        assert not graph.find_nodes(op="call_function", target=operators.quantize_rows.default)


def test_layers_of_another_library(seen):
    """torchao's weights multiply themselves: their layers are left as they are."""
    quantization = pytest.importorskip("torchao.quantization")
    entry, pipe = TINY["flux"], build("flux")
    quantization.quantize_(
        pipe.transformer,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, path: isinstance(module, torch.nn.Linear) and "blocks" in path,
    )
    stock = entry.run(pipe, steps=1)
    accelerate(pipe, compile=COUNTED)
    torch.testing.assert_close(entry.run(pipe, steps=1), stock, atol=1e-4, rtol=1e-4)
    left = counted(seen, "linear_gelu", "concat_linear", "skinny_linear")
    assert not any(left) and counted(seen, "residual_norm")[0]


def test_gradients(seen):
    """Where they are recorded, blocks run as stock code has them; attention's own operator says that it cannot."""
    pipe = build("wan")
    given = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, requires_grad=True),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, pipe.transformer.config.text_dim),
    }

    def gradient():
        out = pipe.transformer(**given, return_dict=False)[0]
        return torch.autograd.grad(out.square().sum(), given["hidden_states"])[0]

    stock = gradient()
    accelerate(pipe, compile=COUNTED)
    torch.testing.assert_close(gradient(), stock, atol=1e-4, rtol=1e-4)
    assert not any(name.startswith("diffusers_accel") for name in seen)
    accelerate(pipe, attention="sdpa", compile=COUNTED)
    with pytest.raises(RuntimeError, match=r"attention\.default is for inference"):
        gradient()
    assert {name for name in seen if name.startswith("diffusers_accel")} == {"diffusers_accel::attention"}


def test_what_is_written_to_in_place(seen):
    """A pass is done where the last of its parts stood: what it reads may not have changed by then, nor be made from
    what the pass gives."""
    scale, shift, weight, bias = torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.randn(8, 16), torch.randn(8)

    def norm(x, y):
        found = F.layer_norm(x, (8,))
        x[:, 1:] += 1.0
        return found * (1 + scale) + shift, F.layer_norm(x + y, (8,))

    def spelled_out(x, y):
        factor = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        found = x * factor
        last = found * scale[0, 0]
        x.mul_(3.0)
        return last, x

    def from_the_sum(x, y):
        total = x + y
        factor = total.mean(1, keepdim=True)
        return F.layer_norm(total, (8,)) * (1 + factor) + shift, total

    def product(x, y):
        both = torch.cat([x, y], -1)
        x.mul_(2.0)
        found = F.linear(both, weight, bias)
        gelu = F.linear(x, weight[:, :8], bias)
        x.add_(1.0)
        return found, F.gelu(gelu, approximate="tanh")

    def by_an_activation(x, y):
        found = F.layer_norm(x, (8,))
        F.silu(x, inplace=True)
        F.relu(y, True)
        return found * (1 + scale) + shift, F.layer_norm(x + y, (8,))

    for function in (norm, spelled_out, from_the_sum, product, by_an_activation):
        x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        expected = function(x.clone(), y)
        with torch.no_grad():
            found = torch.compile(function, backend=rewrites.rewritten(COUNTED.backend))(x, y)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("write", [lambda y: y.add_(1.0), lambda y: F.silu(y, inplace=True), lambda y: F.relu(y, True)])
def test_an_activation_of_what_is_written_to_in_place(seen, write):
    """A GEMM of a few rows reads its input anew, so it takes no SiLU's input that has changed since."""
    weight = torch.randn(1024, 1024)

    def function(y):
        hidden = F.silu(y).reshape(2, 1024)
        write(y)
        return F.linear(hidden, weight), y

    y = torch.randn(2, 1024)
    expected = function(y.clone())
    with torch.no_grad():
        found = torch.compile(function, backend=rewrites.rewritten(COUNTED.backend))(y)
    assert counted(seen, "skinny_linear") == (0,)
    torch.testing.assert_close(found, expected)


def test_operators():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    sums = torch.einsum("abk,nk->abn", torch.cat([x, y], -1), weight) + bias
    torch.testing.assert_close(concat_linear([x, y], weight, bias), sums)
    tanh = 0.5 * sums * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (sums + 0.044715 * sums**3)))
    torch.testing.assert_close(linear_gelu(torch.cat([x, y], -1), weight, bias), tanh)
    for function, args in ((concat_linear, ([x, y], weight, bias)), (linear_gelu, (x, weight[:, :4], bias))):
        torch.library.opcheck(function, args)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_takes_them(monkeypatch, tmp_path, on_cpu):
    """As inductor's own pass, on the CPU, with its modes."""
    ran = []
    monkeypatch.setattr(rewrites.Rewrites, "uuid", lambda self: "a test")
    stock_call = rewrites.Rewrites.__call__
    monkeypatch.setattr(rewrites.Rewrites, "__call__", lambda self, graph: (ran.append(1), stock_call(self, graph))[1])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    entry, pipe = TINY["wan"], build("wan")
    stock = entry.run(pipe, steps=1)
    for _ in range(2):
        accelerate(pipe, attention="sdpa", compile=True)
        torch.testing.assert_close(entry.run(pipe, steps=1), stock, atol=1e-4, rtol=1e-4)
    assert len(ran) == 1, "accelerated again, it finds what was compiled"
    torch.compiler.reset()
