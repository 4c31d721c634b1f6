"""Private names of other packages: none stands outside `compat/`, and each that stands there is as it was read.

The first part reads the sources. The second has one test per name, on small real objects: the id of a failing test says
which name of which package has changed, and its message who depends on it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import accelerate.hooks
import diffusers
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, group_offloading, layerwise_casting
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from torch import nn
from torch.fx import Graph
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_accel
from diffusers_accel.compat import accelerate_private as of_accelerate
from diffusers_accel.compat import diffusers_private as of_diffusers
from diffusers_accel.compat import torch_private as of_torch
from diffusers_accel.errors import Unsupported

ROOT = Path(diffusers_accel.__file__).parent
MODULES = {"torch": of_torch, "diffusers": of_diffusers, "accelerate": of_accelerate}
NAMES = [(package, name) for package, module in MODULES.items() for name in module.NAMES]

# --- the sources -----------------------------------------------------------------------------------------------------

# Functions of Python's `sys` that are documented.
PYTHON = {"_getframe", "_current_frames"}
# Names in checkpoints of other packages, which their formats define.
FORMATS = {"_quantization_metadata", "_data", "_scale"}
# The beginning of this package's own attributes on objects of others.
OWN_PREFIX = "_diffusers_accel"


def is_private(name: str) -> bool:
    """Whether a name is private. Names between underscores belong to protocols of Python or IPython."""
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


# Private names that other packages' objects have, also where this package has an attribute of that name.
FOREIGN = {part for _, name in NAMES for part in name.split(".") if is_private(part)} | {"AttentionBackendName"}


def defined(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables, arguments and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def foreign_names(tree: ast.AST, own: set[str], foreign: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every private name of another package that a file has.

    Args:
        tree: The file.
        own: Names that this package defines.
        foreign: Names that other packages define too.
    """
    found: list[tuple[int, str]] = []
    here = defined(tree)
    # The names that imports of other packages bind; docstrings; the parts of f-strings.
    imported, prose, parts = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Expr):
            prose.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts |= set(node.values)

    def note(node: ast.AST, *names: str) -> None:
        found.extend((getattr(node, "lineno", 0), name) for name in names)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            note(node, *(part for alias in node.names for part in alias.name.split(".") if is_private(part)))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            note(node, *(name for name in names if is_private(name) or name in foreign))
        elif isinstance(node, ast.Attribute) and (is_private(node.attr) or node.attr in foreign):
            base = ast.unparse(node.value)
            # An attribute of this package with a foreign name is read from `self`, in the file that sets it.
            ours = own if node.attr not in foreign else here if base == "self" else ()
            if base.partition(".")[0] in imported or node.attr not in ours:
                note(node, node.attr)
        elif isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)))
            note(node, *(item.name for item in methods if item.name in foreign))
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg in foreign:
            note(node, node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            # A part of an f-string may begin in the middle of a word.
            words = re.findall(r"(?:(?<=[\s.`'\"(\[])|^)_\w+", ("x" if node in parts else "") + node.value)
            note(node, *(word for word in words if is_private(word) and (word in foreign or word not in own)))
    return [(line, name) for line, name in found if not name.startswith(OWN_PREFIX) and name not in PYTHON | FORMATS]


TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
OWN = set().union(*(defined(tree) for file, tree in TREES.items() if not file.startswith("compat/")))


def test_private_names_of_other_packages_stand_in_compat_alone():
    wrong = [
        f"{file}:{line}: {name}"
        for file, tree in TREES.items()
        if not file.startswith("compat/")
        for line, name in foreign_names(tree, OWN, FOREIGN)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._inductor", "_inductor"),
        ("from torch.utils import _pytree as pytree", "_pytree"),
        ("from torch._dynamo import config", "_dynamo"),
        ("from diffusers.models.attention_dispatch import AttentionBackendName", "AttentionBackendName"),
        ("import torch\ntorch._never_read(x)", "_never_read"),
        ("import torch\ntorch._shared(x)", "_shared"),
        ("pipe._never_read", "_never_read"),
        ("module._buffers", "_buffers"),
        ("class A:\n    def f(self):\n        return self._buffers", "_buffers"),
        ("class A:\n    def _apply(self, fn): ...", "_apply"),
        ("def attention(query, _parallel_config=None): ...", "_parallel_config"),
        ("backend(_parallel_config=None)", "_parallel_config"),
        ("vars(module)['_hf_hook']", "_hf_hook"),
        ("getattr(pipe, '_never_read', None)", "_never_read"),
        ("print(f'{x}: torch._inductor.list_options() has all')", "_inductor"),
    ],
)
def test_a_private_name_is_found(code, name):
    assert [found for _, found in foreign_names(ast.parse(code), {"_shared"}, FOREIGN)] == [name]


@pytest.mark.parametrize(
    "code",
    [
        "self._shared",
        "other._shared",
        "class A:\n    def f(self):\n        self._buffers = []\n        self._buffers.append(1)",
        "def _apply(x): ...\n_apply(1)",
        "from .x import _never_read",
        "import sys\nsys._getframe(1)",
        "name._value_, module.__dict__, f'__i{name}__'",
        "def f():\n    'the `_buffers` of a module'",
        "f'{name}_img'",
        "'add_q_proj'",
        "'_diffusers_accel_mark'",
    ],
)
def test_other_names_are_not_found(code):
    assert not foreign_names(ast.parse(code), {"_shared"}, FOREIGN)


def test_every_private_name_in_compat_is_in_its_table():
    for file, tree in TREES.items():
        if file.startswith("compat/") and file != "compat/__init__.py":
            own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            names = {name for _, name in foreign_names(tree, own, FOREIGN)}
            listed = {part for name in MODULES[Path(file).stem.partition("_")[0]].NAMES for part in name.split(".")}
            assert names <= listed, f"{file}: {names - listed}"


def test_every_name_of_a_table_is_in_the_definitions():
    for module in MODULES.values():
        source = inspect.getsource(module)
        (table,) = (
            node
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES"
        )
        definitions = source.replace(ast.get_source_segment(source, table), "")
        stale = [name for name in module.NAMES if name.rpartition(".")[2] not in definitions]
        assert not stale, stale


def test_importing_compat_imports_no_other_package():
    """A function imports what it needs, except torch, which has imported these parts of itself."""
    allowed = {"torch", "torch.utils._python_dispatch", "torch.utils._pytree"}
    for file, tree in TREES.items():
        for node in tree.body if file.startswith("compat/") else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            other = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} - allowed
            assert not other, f"{file}: {other}"


# --- the installed versions: checks of torch -------------------------------------------------------------------------

CHECKS = {}


def check(*names):
    """A decorator: the function fails if one of these names has changed."""

    def add(function):
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return add


def has_schema(ours, operator, arguments, results=("",)):
    """Whether a name of compat is an operator of torch, with these first arguments and results."""
    assert not isinstance(ours, of_torch.functools.partial), "it is gone"
    schema = operator.default._schema
    assert [item.name for item in schema.arguments][: len(arguments)] == list(arguments), schema
    assert len(schema.returns) >= len(results), schema
    assert all(found.name.replace("_", "") == name for found, name in zip(schema.returns, results, strict=False))


def takes(function, *names):
    """Whether a function has these parameters, in this order, and no other without a default."""
    parameters = inspect.signature(function).parameters
    assert list(parameters)[: len(names)] == list(names), inspect.signature(function)
    assert all(item.default is not item.empty for item in list(parameters.values())[len(names) :])


@check("torch._scaled_mm")
def scaled_mm():
    names = "self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"
    has_schema(of_torch.scaled_mm, torch.ops.aten._scaled_mm, names)
    assert of_torch.scaled_mm is torch._scaled_mm


@check("torch._addmm_activation")
def addmm_activation():
    names = "self", "mat1", "mat2", "beta", "alpha", "use_gelu"
    has_schema(of_torch.addmm_activation, torch.ops.aten._addmm_activation, names)


@check("torch.ops.aten._scaled_dot_product_flash_attention")
def flash_attention():
    names = "query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"
    has_schema(of_torch.flash_attention, of_torch.flash_attention, names, ("output", "logsumexp"))


@check("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu")
def flash_attention_for_cpu():
    query, key, value = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    mask = torch.randn(4, 4, dtype=torch.float64)
    out, lse = of_torch.flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=mask, scale=0.5)
    scores = query @ key.mT * 0.5 + mask
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ value)


@check("torch.ops.aten._scaled_dot_product_efficient_attention")
def efficient_attention():
    names = "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"
    has_schema(of_torch.efficient_attention, of_torch.efficient_attention, names, ("output", "logsumexp"))


@check("torch.ops.aten._scaled_dot_product_cudnn_attention")
def cudnn_attention():
    names = "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask"
    has_schema(of_torch.cudnn_attention, of_torch.cudnn_attention, (*names, "scale"), ("output", "logsumexp"))


@check("torch._C._AutoDispatchBelowAutograd")
def below_autograd():
    x = torch.ones(2, requires_grad=True)
    with of_torch.AutoDispatchBelowAutograd():
        assert not (x + x).requires_grad
    assert (x + x).requires_grad


@check("torch._C._len_torch_dispatch_stack")
def dispatch_modes():
    class Mode(TorchDispatchMode):
        pass

    assert of_torch.dispatch_mode_count() == 0
    with Mode():
        assert of_torch.dispatch_mode_count() == 1


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


@check("torch._C.DisableTorchFunctionSubclass")
def disabled_torch_function():
    x = torch.ones(2).as_subclass(Marked)
    assert type(x + x) is Marked
    with of_torch.DisableTorchFunctionSubclass():
        assert type(x + x) is torch.Tensor


@check("torch.Tensor._make_wrapper_subclass")
def wrapper_subclass():
    class Empty(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    made = of_torch.make_wrapper_subclass(Empty, (2, 3), strides=(1, 2), dtype=torch.float16, device="cpu")
    assert type(made) is Empty and made.shape == (2, 3) and made.stride() == (1, 2) and made.dtype == torch.float16


@check("torch.Tensor._version")
def version_counter():
    x = torch.zeros(2)
    before = of_torch.version_of(x)
    assert of_torch.version_of(x.add_(1)) == before + 1


@check("torch._ops.OpOverload")
def operator_overload():
    assert isinstance(torch.ops.aten.add.Tensor, of_torch.OpOverload)
    assert not isinstance(torch.ops.aten.add, of_torch.OpOverload)


@check("torch._ops.OpOverload._schema")
def schema():
    plain, in_place = (of_torch.schema_of(each) for each in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor))
    assert [item.name for item in plain.arguments] == ["self", "other", "alpha"]
    assert in_place.is_mutable and not plain.is_mutable
    assert [item.name for item in in_place.arguments if item.alias_info and item.alias_info.is_write] == ["self"]


@check("torch.UntypedStorage._cdata")
def identity_of_storage():
    x, other = torch.zeros(2, device="meta"), torch.zeros(2, device="meta")
    one, view, apart = (of_torch.storage_identity(each.untyped_storage()) for each in (x, x[1:], other))
    assert one == view != apart


@check("torch.utils._pytree")
def pytree():
    value = {"a": [1, (2, None)], "b": 3}
    leaves, form = of_torch.pytree.tree_flatten(value)
    assert leaves == of_torch.pytree.tree_leaves(value) == [1, 2, None, 3]
    assert of_torch.pytree.tree_unflatten(leaves, form) == value
    assert of_torch.pytree.tree_map(str, value) == {"a": ["1", ("2", "None")], "b": "3"}


@check("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
def traceable_wrapper_subclass():
    class Traceable(Marked):
        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride):
            raise NotImplementedError

    plain = torch.ones(2)
    assert of_torch.is_traceable_wrapper_subclass(plain.as_subclass(Traceable))
    assert not of_torch.is_traceable_wrapper_subclass(plain)


@check("torch.nn.Module._parameters")
def parameters_of_modules():
    layer = nn.Linear(1, 1)
    assert of_torch.parameters_of(layer) is vars(layer)[of_torch.PARAMETERS]
    assert of_torch.parameters_of(layer) == {"weight": layer.weight, "bias": layer.bias}


@check("torch.nn.Module._buffers")
def buffers_of_modules():
    layer = nn.BatchNorm1d(1)
    assert of_torch.buffers_of(layer) is vars(layer)[of_torch.BUFFERS]
    of_torch.buffers_of(layer)["running_mean"] = new = torch.ones(1)
    assert layer.running_mean is new


@check("torch.nn.Module._modules")
def children_of_modules():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    assert of_torch.children_of(model) is vars(model)[of_torch.CHILDREN]
    of_torch.children_of(model)["0"] = new = nn.Identity()
    assert model[0] is new


@check("torch.nn.Module._non_persistent_buffers_set")
def non_persistent_buffers():
    layer = nn.BatchNorm1d(1)
    layer.register_buffer("passing", torch.ones(1), persistent=False)
    assert of_torch.non_persistent_buffers_of(layer) == {"passing"}


def hook_dictionary(name, register):
    layer = nn.Linear(1, 1)
    assert name in of_torch.HOOK_DICTIONARIES and not vars(layer)[name]
    handle = register(layer)
    assert vars(layer)[name], f"{register} writes to another dictionary"
    handle.remove()
    assert not vars(layer)[name]


def hook(*args):
    pass


for hooks, register in {
    "_forward_hooks": lambda layer: layer.register_forward_hook(hook),
    "_forward_hooks_with_kwargs": lambda layer: layer.register_forward_hook(hook, with_kwargs=True),
    "_forward_hooks_always_called": lambda layer: layer.register_forward_hook(hook, always_call=True),
    "_forward_pre_hooks": lambda layer: layer.register_forward_pre_hook(hook),
    "_forward_pre_hooks_with_kwargs": lambda layer: layer.register_forward_pre_hook(hook, with_kwargs=True),
    "_backward_hooks": lambda layer: layer.register_full_backward_hook(hook),
    "_backward_pre_hooks": lambda layer: layer.register_full_backward_pre_hook(hook),
}.items():
    CHECKS[f"torch.nn.Module.{hooks}"] = lambda name=hooks, register=register: hook_dictionary(name, register)


class Counted(of_torch.StateMethods):
    """A module that counts the calls of the methods that it overrides."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), []

    def save_to_state_dict(self, destination, prefix, keep_vars):
        super().save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "more"] = torch.ones(1)

    def load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        assert state_dict.pop(prefix + "more") == 1 and strict and local_metadata is not None
        super().load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        assert not missing and not unexpected and not errors

    def apply_to_tensors(self, function, recurse=True):
        self.calls.append(recurse)
        return super().apply_to_tensors(function, recurse)


@check("torch.nn.Module._apply")
def applied_to_tensors():
    model = nn.Sequential(Counted())
    assert model.to(torch.float16)[0].weight.dtype == torch.float16
    of_torch.apply_to_tensors(model, torch.Tensor.double)
    assert model[0].weight.dtype == torch.float64 and model[0].calls == [True, True]


@check("torch.nn.Module._save_to_state_dict", "torch.nn.Module._load_from_state_dict")
def state_dict():
    model, other = nn.Sequential(Counted()), nn.Sequential(Counted())
    nn.init.zeros_(model[0].weight)
    saved = model.state_dict()
    assert set(saved) == {"0.weight", "0.more"}
    other.load_state_dict(saved)
    assert other[0].weight == 0


@check("torch._subclasses.FakeTensorMode", "torch.utils._python_dispatch.TorchDispatchMode")
def fake_tensors():
    """A mode sees the operators of tensors without memory, whose storages have a size and an end."""
    seen = []

    class Mode(of_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with of_torch.FakeTensorMode(), Mode():
        x = torch.empty(2**40, dtype=torch.float32)
        y = x + 1
    assert seen == [torch.ops.aten.empty.memory_format, torch.ops.aten.add.Tensor]
    assert y.untyped_storage().nbytes() == 2**42
    storage = weakref.ref(y.untyped_storage())
    view = y[1:]
    del y
    assert storage() is not None
    del view
    assert storage() is None


@check("torch.nn.Conv2d._conv_forward", "torch.nn.Conv3d._conv_forward")
def conv_forward():
    for convolution in (nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1)):
        takes(getattr(convolution, of_torch.CONV_FORWARD), "input", "weight", "bias")
        x = torch.ones(1, 1, *convolution.kernel_size)
        vars(convolution)[of_torch.CONV_FORWARD] = lambda x, weight, bias: x + 1
        assert torch.equal(convolution(x), x + 1), "forward calls another method"


@check("torch.nn.Module._compiled_call_impl", "torch._dynamo.OptimizedModule._orig_mod")
def compiled_modules():
    layer = nn.Linear(1, 1)
    assert not of_torch.is_compiled_copy(layer) and not of_torch.is_compiled_in_place(layer)
    assert of_torch.is_compiled_copy(torch.compile(layer, backend="eager"))
    layer.compile(backend="eager")
    assert of_torch.is_compiled_in_place(layer)


@check("torch._dynamo.config.recompile_limit")
def recompile_limit():
    before = torch._dynamo.config.recompile_limit
    with of_torch.recompile_limit_at_least(before + 1):
        assert torch._dynamo.config.recompile_limit == before + 1
        with of_torch.recompile_limit_at_least(1):
            assert torch._dynamo.config.recompile_limit == before + 1
    assert torch._dynamo.config.recompile_limit == before


@check("torch._dynamo.exc.Unsupported")
def graph_break():
    @torch.compile(backend="eager", fullgraph=True)
    def breaks(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(of_torch.graph_break_error()):
        breaks(torch.ones(1))


@check("torch._dynamo.exc.FailOnRecompileLimitHit")
def recompile_limit_hit():
    @torch.compile(backend="eager", fullgraph=True, dynamic=False)
    def function(x):
        return x + 1

    with torch._dynamo.config.patch(recompile_limit=1):
        function(torch.ones(1))
        with pytest.raises(of_torch.recompile_limit_error()):
            function(torch.ones(2))


@check("torch._dynamo.lookup_backend", "torch._guards.CompileContext.try_get")
def tracing():
    traced = []

    def backend(module, inputs):
        traced.append(of_torch.is_tracing())
        return of_torch.lookup_backend("eager")(module, inputs)

    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1)) == 2
    assert traced == [True] and not of_torch.is_tracing()


@check("torch._inductor.compile_fx", "torch._inductor.select_algorithm")
def compiler_modules():
    for name in of_torch.COMPILER_MODULES:
        assert importlib.util.find_spec(name) is not None, f"{name} is gone"


@check("torch._inductor.list_mode_options")
def modes():
    assert {"default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"} <= set(
        of_torch.inductor_modes()
    )
    assert of_torch.inductor_mode_options("reduce-overhead")[of_torch.INDUCTOR_CUDA_GRAPHS] is True


@check("torch._inductor.list_options")
def options():
    assert set(of_torch.REORDERINGS) <= set(eval(of_torch.LIST_OPTIONS))


@check("torch._inductor.config.get_config_copy", "torch._inductor.config.get_type")
def option_types():
    known = of_torch.inductor_options()
    for name in (*of_torch.REORDERINGS, of_torch.INDUCTOR_CUDA_GRAPHS):
        assert isinstance(known[name], bool) and of_torch.inductor_option_type(name) is bool


@check("torch._inductor.config.pre_grad_custom_pass")
def pre_grad_pass():
    assert of_torch.inductor_options()[of_torch.PRE_GRAD_PASS] is None


@check("torch._inductor.config.reorder_for_locality", "torch._inductor.config.reorder_for_peak_memory")
def reorderings():
    assert set(of_torch.REORDERINGS) <= set(of_torch.inductor_options())


@check("torch._inductor.config.triton.cudagraphs")
def inductor_cuda_graphs():
    assert of_torch.inductor_options()[of_torch.INDUCTOR_CUDA_GRAPHS] is False


@check("torch._inductor.custom_graph_pass.CustomGraphPass")
def graph_pass():
    kind = of_torch.custom_graph_pass()
    assert kind.__abstractmethods__ == {"__call__", "uuid"}
    takes(kind.__call__, "self", "graph")


@check("torch._higher_order_ops.effects._register_effectful_op", "torch._higher_order_ops.effects._EffectType")
def effects():
    from torch._higher_order_ops import effects

    takes(effects._register_effectful_op, "op", "effect")
    assert effects._EffectType.ORDERED


@check("torch.fx.Node._erased")
def erased():
    graph = Graph()
    node = graph.placeholder("x")
    assert not of_torch.is_erased(node)
    graph.erase_node(node)
    assert of_torch.is_erased(node)


@check("torch.distributed._symmetric_memory.empty", "torch.distributed._symmetric_memory.rendezvous")
def symmetric_memory():
    from torch.distributed import _symmetric_memory

    takes(_symmetric_memory.empty, "size", "dtype", "device")
    takes(_symmetric_memory.rendezvous, "tensor", "group")


@check("torch._C._distributed_c10d._SymmetricMemory")
def symmetric_handle():
    kind = torch._C._distributed_c10d._SymmetricMemory
    for method, words in {"get_buffer": ("rank", "sizes", "dtype", "storage_offset"), "barrier": ("channel",)}.items():
        assert all(word in getattr(kind, method).__doc__ for word in words), getattr(kind, method).__doc__


# --- checks of diffusers and accelerate ------------------------------------------------------------------------------


@check(
    "attention_dispatch.AttentionBackendName",
    "attention_dispatch._AttentionBackendRegistry._backends",
    "attention_dispatch._AttentionBackendRegistry._constraints",
    "attention_dispatch._AttentionBackendRegistry._supported_arg_names",
    "attention_dispatch.dispatch_attention_fn._parallel_config",
)
def attention_backend():
    """A registered backend is called by diffusers' dispatcher, with all arguments."""
    calls, refused = [], []
    function = of_diffusers.attention_backend_function(7, lambda *args: calls.append(args), refused.append)
    name = of_diffusers.attention_backend_name("of a test")
    assert isinstance(name, attention_dispatch.AttentionBackendName) and name.value == "of a test"
    assert name not in attention_dispatch.AttentionBackendName.__members__.values()
    tables = of_diffusers.attention_backend_tables()
    native = attention_dispatch.AttentionBackendName.NATIVE
    for table, entry in zip(tables, of_diffusers.attention_backend_entry(function), strict=True):
        assert isinstance(table[native], type(entry))
        table[name] = entry
    try:
        attention_dispatch.dispatch_attention_fn(
            "query", "key", "value", "mask", 0.0, True, 0.5, backend=name, parallel_config="parallel"
        )
    finally:
        for table in tables:
            del table[name]
    assert calls == [(7, "query", "key", "value", "mask", True, 0.5)] and refused == ["parallel"]
    assert set(inspect.signature(function).parameters) <= tables[-1][native], "an argument is gone"


@check("FluxAttnProcessor._attention_backend", "FluxAttnProcessor._parallel_config")
def processors():
    processor = transformer_flux.FluxAttnProcessor()
    assert getattr(processor, of_diffusers.ATTENTION_BACKEND) is None
    assert type(processor)._parallel_config is None is of_diffusers.parallel_config_of(processor)
    source = inspect.getsource(type(processor).__call__)
    assert f"backend=self.{of_diffusers.ATTENTION_BACKEND}" in source


@check("HookRegistry._diffusers_hook", "HookRegistry._hook_order")
def diffusers_hooks():
    layer, first, second = nn.Linear(1, 1), DiffusersHook(), DiffusersHook()
    assert of_diffusers.diffusers_hooks(layer) == {}
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(first, "first")
    registry.register_hook(second, "second")
    assert vars(layer)[of_diffusers.HOOK_REGISTRY] is registry
    assert of_diffusers.diffusers_hooks(layer) == {"first": first, "second": second}
    assert of_diffusers.ordered_hooks(registry) == [("first", first), ("second", second)]


@check("hooks.layerwise_casting._LAYERWISE_CASTING_HOOK")
def layerwise_casting_hook():
    assert layerwise_casting._LAYERWISE_CASTING_HOOK == of_diffusers.LAYERWISE_CASTING


@check("hooks.group_offloading._GROUP_OFFLOADING")
def group_offloading_hook():
    assert of_diffusers.GROUP_OFFLOADING in group_offloading._GROUP_OFFLOADING


@check(
    "hooks.group_offloading._apply_group_offloading",
    "hooks.group_offloading._get_top_level_group_offload_hook",
    "hooks.group_offloading._LAYER_EXECUTION_TRACKER",
    "hooks.group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING",
)
def group_offloading_of_a_model():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    cpu = torch.device("cpu")
    assert of_diffusers.group_offloading_config(model) is None
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1)
    config = of_diffusers.group_offloading_config(model)
    assert config.offload_device == cpu and config.offload_to_disk_path is None

    def hooks():
        return {path: set(of_diffusers.diffusers_hooks(module)) for path, module in model.named_modules()}

    before = hooks()
    of_diffusers.remove_group_offloading(model)
    assert not any(hooks().values())
    of_diffusers.apply_group_offloading(model, config)
    assert hooks() == before


@check("DiffusionPipeline._all_hooks")
def hooks_of_a_pipeline():
    kind = diffusers.DiffusionPipeline
    for method in (kind.enable_model_cpu_offload, kind.maybe_free_model_hooks, kind.remove_all_hooks):
        assert of_diffusers.MODEL_OFFLOAD_HOOKS in method.__code__.co_names, method


class Bare(diffusers.DiffusionPipeline):
    """A pipeline of one component."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


@check("DiffusionPipeline._execution_device")
def execution_device():
    assert of_diffusers.execution_device(Bare(diffusers.DDIMScheduler())) == torch.device("cpu")


@check("DiffusionPipeline._progress_bar_config")
def progress_bar():
    pipe = Bare(diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert vars(pipe)[of_diffusers.PROGRESS_BAR_CONFIG] == {"disable": True}


@check("DiffusionPipeline._offload_device", "DiffusionPipeline._offload_gpu_id")
def offload_attributes():
    kind = diffusers.DiffusionPipeline
    for method in (kind.enable_model_cpu_offload, kind.enable_sequential_cpu_offload):
        assert {of_diffusers.OFFLOAD_DEVICE, of_diffusers.OFFLOAD_GPU_ID} <= set(method.__code__.co_names), method
    assert of_diffusers.OFFLOAD_DEVICE in kind.maybe_free_model_hooks.__code__.co_consts


@check("ModelMixin._repeated_blocks", "ModelMixin._no_split_modules")
def blocks_of_models():
    kind = diffusers.FluxTransformer2DModel
    names = {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    assert set(kind._repeated_blocks) == set(kind._no_split_modules) == of_diffusers.block_class_names(kind) == names
    assert of_diffusers.block_class_names(diffusers.ModelMixin) == set()


@check("ModelMixin._keep_in_fp32_modules")
def float32_modules():
    assert "time_embedder" in of_diffusers.float32_modules(diffusers.WanTransformer3DModel)
    assert of_diffusers.float32_modules(diffusers.ModelMixin) == ()


@check("ModelMixin._parallel_config")
def parallel_config():
    assert diffusers.ModelMixin._parallel_config is None is of_diffusers.parallel_config_of(diffusers.ModelMixin)


@check("ConfigMixin._class_name")
def class_name():
    saved = diffusers.DDIMScheduler().to_json_string()
    assert f'"{of_diffusers.CLASS_NAME}": "DDIMScheduler"' in saved


@check("QwenImageTransformerBlock._modulate")
def modulate():
    kind = transformer_qwenimage.QwenImageTransformerBlock
    x, shift, scale, gate = torch.randn(2, 3, 4), *torch.randn(3, 2, 4)
    modulation = torch.cat([shift, scale, gate], -1)
    found, found_gate = of_diffusers.modulate_qwen(object.__new__(kind), x, modulation, None)
    torch.testing.assert_close(found, x * (1 + scale[:, None]) + shift[:, None])
    assert torch.equal(found_gate, gate[:, None])
    takes(kind._modulate, "self", "x", "mod_params", "index")


@check("hooks.add_hook_to_module._hf_hook", "hooks.add_hook_to_module._old_forward")
def accelerate_hook():
    layer, hook = nn.Linear(1, 1), accelerate.hooks.ModelHook()
    forward = layer.forward
    assert not of_accelerate.has_accelerate_hook(layer)
    accelerate.hooks.add_hook_to_module(layer, hook)
    assert of_accelerate.has_accelerate_hook(layer) and vars(layer)[of_accelerate.ACCELERATE_HOOK] is hook
    assert vars(layer)[of_accelerate.WRAPPED_FORWARD] == forward != layer.forward
    accelerate.hooks.remove_hook_from_module(layer)
    assert not of_accelerate.has_accelerate_hook(layer) and of_accelerate.WRAPPED_FORWARD not in vars(layer)


# --- the tests of the names ------------------------------------------------------------------------------------------


def complaint(package, name):
    """The reason why a name is not as it was read, with who depends on it; `None` if it is."""
    module = MODULES[package]
    try:
        CHECKS[name]()
    except Exception as error:
        return (
            f"{name} has changed in {package} {version(package)}: {type(error).__name__}: {error}\n"
            f"It was read in {module.READ}, and carries: {module.NAMES[name]}.\n"
            f"Mend {Path(module.__file__).relative_to(ROOT.parent)}, and put this version into READ."
        )
    return None


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{package}: {name}" for package, name in NAMES])
def test_a_name_is_as_it_was_read(package, name):
    found = complaint(package, name)
    if found is not None:
        pytest.fail(found, pytrace=False)


def test_every_name_has_a_check_and_says_who_depends_on_it():
    assert set(CHECKS) == {name for _, name in NAMES}
    assert all(module.NAMES[name] for module in MODULES.values() for name in module.NAMES)
    for package, module in MODULES.items():
        assert module.READ.startswith(f"{package} ")


def test_a_change_is_named(monkeypatch):
    assert complaint("accelerate", "hooks.add_hook_to_module._old_forward") is None
    monkeypatch.setattr(of_accelerate, "WRAPPED_FORWARD", "_moved_elsewhere")
    found = complaint("accelerate", "hooks.add_hook_to_module._old_forward")
    assert f"_old_forward has changed in accelerate {version('accelerate')}" in found
    assert "read in accelerate 1.15" in found and "layers around a hooked forward" in found
    monkeypatch.delattr(transformer_qwenimage.QwenImageTransformerBlock, "_modulate")
    assert "the cache signal of Qwen-Image" in complaint("diffusers", "QwenImageTransformerBlock._modulate")


def test_a_name_that_is_gone_raises_when_it_is_called():
    """The package can be imported, and its other features run."""
    gone = of_torch._bound(torch.ops.aten, "_never_read")
    with pytest.raises(Unsupported, match=rf"_never_read: torch .* lacks it; it was read in {of_torch.READ}"):
        gone(1, scale=2)


def test_linear_and_gelu_are_public():
    """Rewrites look for the functions that graphs hold, which the public names are."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    x = torch.ones(1, 2)
    torch.compile(lambda x: F.gelu(F.linear(x, x), approximate="tanh"), backend=backend)(x)
    assert {F.linear, F.gelu} <= {node.target for node in graphs[0].nodes}
