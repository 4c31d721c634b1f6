"""The mechanism of lazy tensors, for each kind: metadata without values, writes that later uses see, and views."""

from __future__ import annotations

import copy
import operator
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_accel.core.later import Later
from diffusers_accel.core.lazy_tensor import METADATA, LazyTensor, materialized, written_arguments
from diffusers_accel.kernels.attention import DeferredQK
from diffusers_accel.kernels.linear import LinearProxy

KINDS = ["later", "deferred", "weight"]


@dataclass
class Case:
    """A lazy tensor, an ordinary tensor of the same values, and a count of how often the values were computed."""

    kind: str
    stock: torch.Tensor
    computed: list[int] = field(default_factory=list)

    def __post_init__(self):
        values = self.stock.clone()

        def compute(*_):
            self.computed.append(1)
            return values.clone()

        if self.kind == "later":
            self.lazy = Later(torch.empty_like(values, device="meta"), values.device, compute, lambda: True)
        elif self.kind == "deferred":
            self.lazy = DeferredQK.wrap(torch.zeros_like(values) - 1, compute, None)
        else:
            self.lazy = Exact(values, self.computed).weight

    @property
    def now(self):
        """The values as a new use sees them."""
        return self.lazy.layer.weight + 0 if self.kind == "weight" else self.lazy + 0


class Exact(LinearProxy):
    """A proxy that rounds nothing."""

    kind = "exact"

    def __init__(self, weight, computed):
        nn.Module.__init__(self)
        self.register_parameter("bias", None)
        self.out_features, self.in_features = weight.shape
        self.weight_dtype = weight.dtype
        self.stored, self.computed = weight, computed

    @property
    def device(self):
        return self.stored.device

    def materialize(self):
        self.computed.append(1)
        return self.stored.clone()

    def set_weight(self, value):
        self.stored = self._validated(value).clone()


@pytest.fixture(params=KINDS)
def case(request):
    return Case(request.param, torch.arange(12.0).view(3, 4) + 1)


def test_metadata_needs_no_values(case):
    lazy, stock = case.lazy, case.stock
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta",
                 "is_sparse", "itemsize", "nbytes"):  # fmt: skip
        assert getattr(lazy, name) == getattr(stock, name), name
    for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_complex", "get_device"):
        assert getattr(lazy, name)() == getattr(stock, name)(), name
    assert lazy.size(1) == lazy.size(dim=-1) == 4 and len(lazy) == 3
    assert torch.numel(lazy) == 12 and torch.is_floating_point(lazy)
    assert isinstance(lazy, torch.Tensor) and isinstance(hash(lazy), int)
    assert type(lazy).__name__ in repr(lazy)
    assert not case.computed


def test_any_other_use_sees_the_values(case):
    lazy, stock = case.lazy, case.stock
    for use in (
        lambda x: x * 2 - x.mean(),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.stack((x, x)),
        lambda x: torch.add(input=x, other=x),
        lambda x: torch.einsum("ab,cb->ac", [x, x]),
        lambda x: torch.zeros(3, 4).copy_(x),
        lambda x: torch.ops.aten.mul.Tensor(x, x),
        lambda x: torch.zeros(3, 4)[:, (x[0] > 2).tolist()],
        lambda x: torch.tensor(x.tolist()),
    ):
        found = materialized(use(lazy))
        assert type(found) is torch.Tensor and torch.equal(found, use(stock))
    with torch._C.DisableTorchFunctionSubclass():  # as in code that bypasses `__torch_function__`
        assert torch.equal(torch.mul(lazy, 2), stock * 2)
    assert case.computed


def test_nested_arguments_are_materialized(case):
    lazy = case.lazy
    pair = torch.return_types.max((lazy, torch.zeros(3)))
    found = materialized({"a": [lazy, (1, lazy)], "b": {"c": pair}, "d": None})
    assert found["d"] is None and found["a"][1][0] == 1 and type(found["b"]["c"]) is torch.return_types.max
    for item in (found["a"][0], found["a"][1][1], found["b"]["c"].values):
        assert type(item) is torch.Tensor and torch.equal(item, case.stock)
    assert materialized("a") == "a" and materialized(case.stock) is case.stock


def _augmented_data(x):
    x.data += 1


OUT = {
    "out=": lambda x: torch.add(torch.ones(3, 4), 2, out=x),
    "overload out=": lambda x: torch.ops.aten.add.out(torch.ones(3, 4), torch.ones(3, 4), out=x),
    "out= of several": lambda x: torch.frexp(torch.ones(3, 4), out=(x, torch.empty(3, 4, dtype=torch.int32))),
}
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
WRITES = {
    "add_": lambda x: x.add_(1),
    "with itself": lambda x: x.mul_(x),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "init by keyword": lambda x: nn.init.uniform_(x, 3.0, 3.0),
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "inplace=": lambda x: F.elu(x, inplace=True),
    "copy_": lambda x: x.copy_(torch.ones(4)),
    "setitem": lambda x: operator.setitem(x, (slice(1), ...), 7.0),
    "setitem of all": lambda x: operator.setitem(x, ..., torch.ones(3, 4)),
    "data": lambda x: setattr(x, "data", torch.ones(3, 4)),
    "data +=": _augmented_data,
    **{name: lambda x, name=name: getattr(operator, name)(x, 2) for name in IN_PLACE},
    **OUT,
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_later_uses_see_a_write(case, write):
    lazy, stock = case.lazy, case.stock
    if case.kind == "weight" and write in OUT.values():
        with pytest.raises(TypeError, match="exact layer cannot be an `out=`"):
            write(lazy)
        assert torch.equal(case.now, stock)
        return
    returned, expected = write(lazy), write(stock)
    assert torch.equal(case.now, stock)
    assert (returned is lazy) == (expected is stock)
    # And the write after it.
    lazy.sub_(3)
    assert torch.equal(case.now, stock - 3)


@pytest.mark.parametrize("name", ["iand", "ior", "ixor", "ilshift", "irshift"])
def test_writes_to_integers(name):
    case = Case("deferred", torch.arange(12).view(3, 4))
    assert getattr(operator, name)(case.lazy, 2) is case.lazy
    assert torch.equal(case.now, getattr(operator, name)(case.stock, 2))


def test_a_write_below_torch_function_is_seen(case):
    with torch._C.DisableTorchFunctionSubclass():
        case.lazy.add_(1)
    assert torch.equal(case.now, case.stock + 1)


def test_a_failed_write_changes_nothing(case):
    with pytest.raises(RuntimeError):
        case.lazy.add_(torch.ones(5))
    assert torch.equal(case.now, case.stock)


def test_shape_follows_a_write_that_changes_it(case):
    if case.kind == "weight":
        with pytest.raises(ValueError, match=r"shape \(3, 4\), not \(4, 3\)"):
            case.lazy.t_()
        return
    assert case.lazy.t_() is case.lazy
    assert case.lazy.shape == (4, 3) and case.lazy.stride() == (1, 4) and torch.equal(case.now, case.stock.T)


def test_writes_to_others_leave_it(case):
    room = torch.ones(3, 4)
    assert room.add_(case.lazy) is room and type(room) is torch.Tensor and torch.equal(room, case.stock + 1)
    assert torch.add(case.lazy, 1, out=room) is room
    assert torch.equal(case.now, case.stock)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[0], lambda x: x.T, lambda x: x.view(-1), lambda x: x.chunk(2, dim=1)[1], lambda x: x.data],
    ids=["row", "transposed", "flat", "chunk", "data"],
)
def test_views_share_memory(case, view):
    if case.kind == "weight" and view(case.stock).shape != (3, 4):
        view(case.lazy).add_(1)  # not a write to the weight, as its class says
        assert torch.equal(case.now, case.stock)
        return
    before = view(case.lazy)
    before.add_(1)
    view(case.stock).add_(1)
    assert torch.equal(case.now, case.stock)
    case.lazy.mul_(2)
    assert torch.equal(before + 0, view(case.stock) * 2)


def test_a_weight_is_never_stale():
    case = Case("weight", torch.ones(3, 4))
    assert case.lazy[0].sum() == 4
    case.lazy.mul_(2)
    case.lazy.layer.set_weight(torch.full((3, 4), 5.0))
    assert torch.equal(case.lazy + 0, torch.full((3, 4), 5.0))


def test_inference_mode():
    with torch.inference_mode():
        for kind in KINDS:
            case = Case(kind, torch.ones(3, 4))
            case.lazy += 1
            assert torch.equal(case.now, torch.full((3, 4), 2.0))
            if kind != "weight":
                case.lazy[0].add_(1)
                assert case.now[0, 0] == 3


def test_copies_are_ordinary_tensors(case):
    cyclic = {}
    cyclic |= {"self": cyclic, "lazy": case.lazy}
    for twin in (
        copy.copy(case.lazy),
        copy.deepcopy(case.lazy),
        copy.deepcopy(cyclic)["lazy"],
        pickle.loads(pickle.dumps(case.lazy)),
    ):
        assert type(twin) is torch.Tensor and torch.equal(twin, case.stock)
    twin.add_(1)
    assert torch.equal(case.now, case.stock)


def test_kinds_mix():
    tensors = [Case(kind, torch.full((3, 4), float(place))) for place, kind in enumerate(KINDS)]
    found = torch.stack([case.lazy for case in tensors])
    assert torch.equal(found, torch.stack([case.stock for case in tensors]))
    tensors[0].lazy.add_(tensors[2].lazy)
    assert torch.equal(tensors[0].now, torch.full((3, 4), 2.0))


def test_written_arguments():
    x, y = torch.ones(2), torch.ones(2)
    for func, args, kwargs, expected in (
        (torch.Tensor.add_, (x, y), {}, [x]),
        (torch.Tensor.__setitem__, (x, 0, y), {}, [x]),
        (torch.Tensor.data.__set__, (x, y), {}, [x]),
        (torch.add, (x, y), {"out": y}, [y]),
        (torch.add, (x, y), {"out": None}, []),
        (torch.ops.aten.add_.Tensor, (x, y), {}, [x]),
        (torch.ops.aten.add.out, (x, x), {"out": y}, [y]),
        (torch.ops.aten.add.Tensor, (x, y), {}, []),
        (F.relu, (x,), {"inplace": True}, [x]),
        (F.relu, (x,), {"inplace": False}, []),
        (torch.Tensor.__invert__, (x,), {}, []),
        (torch.Tensor.add, (x, y), {}, []),
    ):
        found = written_arguments(func, args, kwargs)
        assert [id(item) for item in found] == [id(item) for item in expected], func


def test_names_agree_with_the_schemas_of_torch():
    """Methods of tensors are judged by name. The schemas of their overloads say whether they write to the tensor."""
    writes = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        out = any(argument.kwarg_only and argument.alias_info for argument in schema.arguments)
        of_tensor = schema.arguments and str(schema.arguments[0].type) == "Tensor" and hasattr(torch.Tensor, name)
        if of_tensor and not out:
            first = schema.arguments[0].alias_info
            writes.setdefault(name, set()).add(first is not None and first.is_write)
    x = torch.ones(2)
    found = {name: bool(written_arguments(getattr(torch.Tensor, name), (x,), {})) for name in writes}
    assert sum(found.values()) > 100
    wrong = {name for name, known in writes.items() if known != {found[name]}}
    assert wrong == {"record_stream", "retain_grad"}  # marked as writes, and write no value
    # Methods without a schema of their own.
    assert all(written_arguments(getattr(torch.Tensor, f"__{name}__"), (x,), {}) for name in IN_PLACE)
    assert not any(written_arguments(func, (x,), {}) for func in METADATA)


def test_gradients_flow_to_the_operands():
    x = torch.ones(3, requires_grad=True)
    lazy = DeferredQK.wrap(x, lambda item: item * 3, None)
    assert lazy.requires_grad and isinstance(lazy, LazyTensor)
    (lazy * 2).sum().backward()
    assert x.grad.tolist() == [6.0] * 3
