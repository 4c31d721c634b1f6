"""Private names of torch.

Owns every name of torch that begins with an underscore or lies in a module that does. Names that are called often are
bound once: reading them costs no more than before. Names of the compiler are looked up when a function is called, since
the compiler takes seconds to import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import nn

from ..errors import Unsupported

READ = "torch 2.11 to 2.15"

# Private name -> what depends on it.
NAMES = {
    # Operators.
    "torch._scaled_mm": "8-bit linear layers in compiled graphs, and the rewrites that look for them",
    "torch._addmm_activation": "linear_gelu, into which compiled graphs fuse a linear layer and its GELU",
    "torch.ops.aten._scaled_dot_product_flash_attention": "the kernel 'flash2' where it returns LSE",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "the kernel 'sdpa' on the CPU where it returns LSE",
    "torch.ops.aten._scaled_dot_product_efficient_attention": "the kernel 'sdpa' on a GPU where it returns LSE",
    "torch.ops.aten._scaled_dot_product_cudnn_attention": "the kernel 'cudnn' where it returns LSE",
    # The dispatcher, and tensor subclasses.
    "torch._C._AutoDispatchBelowAutograd": "every operator of this package, in eager code",
    "torch._C._len_torch_dispatch_stack": "every operator of this package, in eager code",
    "torch._C.DisableTorchFunctionSubclass": "lazy tensors, which answer shape and dtype without values",
    "torch.Tensor._make_wrapper_subclass": "lazy tensors, which have no storage",
    "torch.Tensor._version": "caches of activations, and CUDA graphs of runs of blocks",
    "torch._ops.OpOverload": "lazy tensors, which find the arguments that an operator writes to",
    "torch._ops.OpOverload._schema": "lazy tensors, which find the arguments that an operator writes to",
    "torch.UntypedStorage._cdata": "lazy tensors, whose views share memory with them",
    "torch.utils._pytree": "nested arguments and results: graphs, parallelism, lazy tensors, worker processes",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "rewrites, which leave other packages' tensors alone",
    "torch.utils._python_dispatch.TorchDispatchMode": "offload, which predicts the bytes of a VAE's activations",
    "torch._subclasses.FakeTensorMode": "offload, which predicts the bytes of a VAE's activations",
    # Modules.
    "torch.nn.Module._parameters": "edits, checkpoints, FSDP, sessions",
    "torch.nn.Module._buffers": "edits, checkpoints, FSDP, sessions, quantized layers",
    "torch.nn.Module._modules": "every swap of a module, and every walk over a model",
    "torch.nn.Module._non_persistent_buffers_set": "quantized checkpoints",
    "torch.nn.Module._forward_hooks": "hooks on swapped modules, and hooks that compiled code would skip",
    "torch.nn.Module._forward_hooks_with_kwargs": "hooks on swapped modules",
    "torch.nn.Module._forward_hooks_always_called": "hooks on swapped modules",
    "torch.nn.Module._forward_pre_hooks": "hooks on swapped modules, and hooks that compiled code would skip",
    "torch.nn.Module._forward_pre_hooks_with_kwargs": "hooks on swapped modules",
    "torch.nn.Module._backward_hooks": "hooks on swapped modules",
    "torch.nn.Module._backward_pre_hooks": "hooks on swapped modules",
    "torch.nn.Module._apply": "the move of a pipeline to its rank's GPU; casts and moves of quantized layers",
    "torch.nn.Module._save_to_state_dict": "state_dict of quantized and packed layers",
    "torch.nn.Module._load_from_state_dict": "load_state_dict of quantized and packed layers",
    "torch.nn.Module._compiled_call_impl": "the refusal of models that are compiled already",
    "torch.nn.Conv2d._conv_forward": "parallel.vae, which exchanges halos around convolutions",
    "torch.nn.Conv3d._conv_forward": "parallel.vae, which exchanges halos around convolutions",
    # The compiler.
    "torch._dynamo.OptimizedModule._orig_mod": "the refusal of models that are compiled already",
    "torch._dynamo.config.recompile_limit": "compile, whose blocks are compiled once per size and configuration",
    "torch._dynamo.exc.Unsupported": "compile, which allows graph breaks where a block is not a single graph",
    "torch._dynamo.exc.FailOnRecompileLimitHit": "the kernel 'flex', which has a graph for each of so many sizes",
    "torch._dynamo.lookup_backend": "compile with a backend other than inductor",
    "torch._guards.CompileContext.try_get": "the removal of attention backends whose pipeline is gone",
    "torch._inductor.compile_fx": "compile, which imports the compiler before the first request",
    "torch._inductor.select_algorithm": "compile, which imports the compiler before the first request",
    "torch._inductor.list_mode_options": "compile.mode",
    "torch._inductor.list_options": "the message on an unknown option of the compiler",
    "torch._inductor.config.get_config_copy": "compile.options",
    "torch._inductor.config.get_type": "compile.options",
    "torch._inductor.config.pre_grad_custom_pass": "the rewrites of compiled graphs",
    "torch._inductor.config.reorder_for_locality": "compile beside context parallelism",
    "torch._inductor.config.reorder_for_peak_memory": "compile beside context parallelism",
    "torch._inductor.config.triton.cudagraphs": "the refusal of two captures of one graph",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "the rewrites of compiled graphs",
    "torch._higher_order_ops.effects._register_effectful_op": "tensor parallelism in compiled graphs",
    "torch._higher_order_ops.effects._EffectType": "tensor parallelism in compiled graphs",
    "torch.fx.Node._erased": "the rewrites of compiled graphs",
    # Ranks.
    "torch.distributed._symmetric_memory.empty": "symmetric memory",
    "torch.distributed._symmetric_memory.rendezvous": "symmetric memory",
    "torch._C._distributed_c10d._SymmetricMemory": "symmetric memory: the handle of a group's buffers",
}


def _missing(name: str, *_: Any, **__: Any) -> Any:
    raise Unsupported(name, f"torch {torch.__version__} lacks it; it was read in {READ}.", "one of these versions.")


def _bound(owner: Any, name: str) -> Any:
    """A name of torch. Where a newer torch lacks it, a function that says so takes its place, so that features which do
    not need it still run."""
    found = getattr(owner, name, None)
    return functools.partial(_missing, name) if found is None else found


# --- operators -------------------------------------------------------------------------------------------------------

# The GEMM of 8-bit tensors with scales. Graphs hold this object, so rewrites may compare with it.
scaled_mm = _bound(torch, "_scaled_mm")
# addmm with an activation in its epilogue.
addmm_activation = _bound(torch, "_addmm_activation")
# The operators behind `F.scaled_dot_product_attention`, which return the LSE too.
flash_attention = _bound(torch.ops.aten, "_scaled_dot_product_flash_attention")
flash_attention_for_cpu = _bound(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
efficient_attention = _bound(torch.ops.aten, "_scaled_dot_product_efficient_attention")
cudnn_attention = _bound(torch.ops.aten, "_scaled_dot_product_cudnn_attention")


# --- the dispatcher, and tensor subclasses ---------------------------------------------------------------------------

# Context manager: operators called inside record no gradients.
AutoDispatchBelowAutograd = _bound(torch._C, "_AutoDispatchBelowAutograd")
# The number of dispatch modes in force. A mode sees every operator; tracing is one.
dispatch_mode_count = _bound(torch._C, "_len_torch_dispatch_stack")
# Context manager: tensor subclasses are treated as plain tensors inside.
DisableTorchFunctionSubclass = _bound(torch._C, "DisableTorchFunctionSubclass")
# Makes a tensor of a subclass that has shape, dtype and device, and no storage.
make_wrapper_subclass = _bound(torch.Tensor, "_make_wrapper_subclass")
# A tensor's version counter, which in-place writes increase. Inference tensors have none.
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
# An operator with the types of its arguments fixed, and its schema.
OpOverload: Any = _bound(torch._ops, "OpOverload")
schema_of: Callable[[Any], Any] = attrgetter("_schema")
# The address of a storage's object: the same for tensors that share memory, even without any.
storage_identity: Callable[[Any], int] = attrgetter("_cdata")
# Nested lists, tuples, dictionaries and model outputs as trees of leaves.
pytree = torch.utils._pytree
# Whether a tensor is of a subclass that holds other tensors and can be traced.
is_traceable_wrapper_subclass = _bound(torch.utils._python_dispatch, "is_traceable_wrapper_subclass")
# Context manager, and base class of such: its `__torch_dispatch__` is called for every operator inside.
TorchDispatchMode: Any = torch.utils._python_dispatch.TorchDispatchMode
# Context manager: tensors that are made inside have shape, dtype and device, and no memory.
FakeTensorMode = _bound(torch._subclasses, "FakeTensorMode")


# --- modules ---------------------------------------------------------------------------------------------------------

# Keys of a module's `__dict__`: the dictionaries of its own parameters, buffers and children.
PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
# These dictionaries themselves. A change of one changes the module, and keeps the order of names.
parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter(PARAMETERS)
buffers_of: Callable[[nn.Module], dict[str, torch.Tensor | None]] = attrgetter(BUFFERS)
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter(CHILDREN)
# Names of the buffers that no `state_dict` has.
non_persistent_buffers_of: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")

# Keys of a module's `__dict__`: its dictionaries of hooks.
HOOK_DICTIONARIES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# The hooks after and before a module's forward.
forward_hooks_of: Callable[[nn.Module], dict[int, Any]] = attrgetter("_forward_hooks")
forward_pre_hooks_of: Callable[[nn.Module], dict[int, Any]] = attrgetter("_forward_pre_hooks")
# The method of a convolution that computes it from input, weight and bias.
CONV_FORWARD = "_conv_forward"


def apply_to_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces all parameters and buffers of a module and its submodules by what a function makes of them."""
    module._apply(function)


class StateMethods(nn.Module):
    """A module whose subclasses override how it is saved, loaded, cast and moved: the methods that `state_dict`,
    `load_state_dict` and `to` call on each module of a model, under public names."""

    def save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Writes this module's own tensors to `destination`, under names that begin with `prefix`."""
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        """Reads this module's own tensors from `state_dict`; notes names and errors in the three lists."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def apply_to_tensors(self, function: Any, recurse: bool = True) -> nn.Module:
        """Replaces this module's tensors, and with `recurse` its submodules', by what a function makes of them."""
        return super()._apply(function, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        self.load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return self.apply_to_tensors(fn, recurse)


# --- the compiler ----------------------------------------------------------------------------------------------------

# Modules that the first compilation imports.
COMPILER_MODULES = ("torch._inductor.compile_fx", "torch._inductor.select_algorithm")
# Options of inductor: a function that changes a graph before gradients are derived; two reorderings of operators; CUDA
# graphs.
PRE_GRAD_PASS = "pre_grad_custom_pass"
REORDERINGS = ("reorder_for_locality", "reorder_for_peak_memory")
INDUCTOR_CUDA_GRAPHS = "triton.cudagraphs"
# The function that lists the options, as messages name it.
LIST_OPTIONS = "torch._inductor.list_options()"
# Whether a node was removed from its graph.
is_erased: Callable[[torch.fx.Node], bool] = attrgetter("_erased")


def is_compiled_copy(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` has returned this module."""
    return hasattr(module, "_orig_mod")


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def is_tracing() -> bool:
    """Whether Dynamo traces code now."""
    return torch._guards.CompileContext.try_get() is not None


def recompile_limit_at_least(limit: int = 64) -> AbstractContextManager[None]:
    """A context in which Dynamo compiles one function at least so many times before it gives up. Its own default is
    eight, which all pipelines, sizes and configurations of a process share."""
    return torch._dynamo.config.patch(recompile_limit=max(limit, torch._dynamo.config.recompile_limit))


def graph_break_error() -> type[Exception]:
    """The error of Dynamo for code that is not a single graph, where `fullgraph` is on."""
    return torch._dynamo.exc.Unsupported


def recompile_limit_error() -> type[Exception]:
    """The error of Dynamo for code that was compiled as often as the limit lets it, where `fullgraph` is on."""
    return torch._dynamo.exc.FailOnRecompileLimitHit


def lookup_backend(name: str) -> Callable[..., Any]:
    """The function of a backend of `torch.compile`."""
    import torch._dynamo

    return torch._dynamo.lookup_backend(name)


def inductor_modes() -> list[str]:
    """Names of inductor's modes."""
    import torch._inductor

    return list(torch._inductor.list_mode_options())


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The options that a mode of inductor stands for."""
    import torch._inductor

    return torch._inductor.list_mode_options(mode)


def inductor_options() -> dict[str, Any]:
    """Inductor's options with their present values."""
    from torch._inductor import config

    return config.get_config_copy()  # type: ignore[attr-defined]


def inductor_option_type(name: str) -> Any:
    """The type of an option of inductor."""
    from torch._inductor import config

    return config.get_type(name)  # type: ignore[attr-defined]


def custom_graph_pass() -> Any:
    """The base class of inductor's custom passes. `uuid` names a pass in inductor's cache."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def keep_in_order(operator: Any) -> None:
    """Has compiled graphs call an operator in the order of the traced code, and keep calls whose result is not read."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(operator, _EffectType.ORDERED)


# --- ranks -----------------------------------------------------------------------------------------------------------


def allocate_symmetric(nbytes: int, device: torch.device, group_name: Any) -> tuple[torch.Tensor, Any]:
    """Memory of the same size on every rank of a group. A collective.

    Returns:
        This rank's memory as bytes, which lives as long as the tensor; and a handle, a `_SymmetricMemory`. `get_buffer`
        of it shows a peer's memory as a tensor, and `barrier` orders the streams of all ranks.
    """
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    return own, _symmetric_memory.rendezvous(own, group_name)
