"""Stock attention processors whose attention calls go to a dispatcher of this package.

A processor that names its backend gets one of `backends.py`. Another processor (of SD3, Cosmos 1 and 2, and most
classes outside the table of models) is replaced by an instance of a subclass. The subclass runs the stock code with one
global name, the attention function, bound to `dispatch`. No source is copied, and `restore` puts the stock processor
back.

For kernels that norm and rotate query and key themselves, the names of norm and rotation are bound too. In eager code
they defer both (`DeferredQK`). In compiled code they are operators, which a rewrite of the graph joins with attention.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...compat.torch_private import forward_hooks_of, forward_pre_hooks_of
from ...core.edits import SetAttr
from ...kernels.attention import DeferredQK, apply_rope, dispatch
from .backends import refuse_unsupported_arguments


@dataclass(eq=False)
class SetProcessor(SetAttr):
    """Sets a copy of an attention module's processor. Undoing it puts the stock processor back, with every attribute
    that the user has set on the copy."""

    _before: dict[str, Any] = field(default_factory=dict, init=False)

    def apply(self) -> None:
        self._before = dict(vars(self.value))
        super().apply()

    def undo(self) -> None:
        stock, ours = self._old, self._held is not None and not self.replaced
        super().undo()
        if ours and not isinstance(stock, nn.Module):
            changed = {
                name: item for name, item in vars(self.value).items() if self._before.get(name, self) is not item
            }
            vars(stock).update(changed)


def rebindable(processor: Any) -> bool:
    """Whether the processor's code calls attention through a global name, which a subclass can rebind."""
    call = vars(type(processor)).get("__call__")
    if not isinstance(call, types.FunctionType):
        return False
    call = inspect.unwrap(call)
    names, scope = call.__code__.co_names, call.__globals__
    # A rebound processor counts like its stock one, so that a second `accelerate` is checked like the first.
    functional = scope.get("F") is F or isinstance(scope.get("F"), _Functional)
    return "dispatch_attention_fn" in names or ("scaled_dot_product_attention" in names and functional)


class _Functional:
    """`torch.nn.functional` with another `scaled_dot_product_attention`."""

    def __init__(self, attention: Callable[..., Any]):
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


@functools.cache
def rebound_processor(stock: type, number: int, defer: bool = False, use_operator: bool = False) -> type:
    """A subclass of a stock processor that runs the stock code with its attention function bound to a dispatcher.

    Compiled graphs know a class by identity, so there is one subclass for each set of arguments. It holds no pipeline.

    Args:
        stock: Class of the stock processor.
        number: Number of the dispatcher in `DISPATCHERS`.
        defer: Whether eager code defers QK-norm and rotation to the dispatcher's kernels.
        use_operator: Whether compiled code rotates with the operator `apply_rope`, which a rewrite joins with
            attention.
    """
    call = inspect.unwrap(stock.__call__)  # type: ignore[operator]
    code = call.__code__

    def dispatched(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Any = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Any:
        refuse_unsupported_arguments(parallel_config or attention_kwargs)
        return dispatch(number, query, key, value, attn_mask, is_causal, scale)

    def heads_first(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return dispatch(number, query, key, value, attn_mask, is_causal, scale).transpose(1, 2)

    scope = dict(call.__globals__)
    # Dynamo looks up a function's globals in the module that `__name__` names; without that name, in the dictionary.
    scope.pop("__name__", None)
    scope["dispatch_attention_fn"] = dispatched
    scope["F"] = _Functional(heads_first)
    if defer or use_operator:
        code = _rebind_rope(call, scope, defer, use_operator)
    function = types.FunctionType(code, scope, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    function.__module__ = stock.__module__
    whole: Callable[..., Any] = _defer_norms(function) if defer else function

    def stock_instance(cls: type, *args: Any, **kwargs: Any) -> Any:
        """New instances are stock processors: `load_ip_adapter`, for example, calls the class of a processor."""
        return stock(*args, **kwargs)

    return type(
        stock.__name__, (stock,), {"__call__": whole, "__module__": stock.__module__, "__new__": stock_instance}
    )


class _DeferredNorms:
    """An attention module whose QK-norms return `DeferredQK`; every other attribute is the module's own."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ("norm_q", "norm_k") or not _is_rms_norm(found):
            return found
        return lambda x: DeferredQK.rms_norm(x, found.weight, found.eps, found)


def _is_rms_norm(module: Any) -> bool:
    """Whether a module is a stock RMS norm without hooks and with its own `forward`."""
    from diffusers.models.normalization import RMSNorm

    if type(module) not in (nn.RMSNorm, RMSNorm) or getattr(module, "bias", None) is not None:
        return False
    return not (forward_hooks_of(module) or forward_pre_hooks_of(module) or "forward" in vars(module))


def _defer_norms(function: types.FunctionType) -> Callable[..., Any]:
    """A processor's call with deferred QK-norms, unless the processor joins two streams between norm and attention."""

    @functools.wraps(function)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and getattr(attn, "added_kv_proj_dim", None) is None:
            attn = _DeferredNorms(attn)
        return function(self, attn, *args, **kwargs)

    return call


# The arguments of a rotation for `DeferredQK.rope`: cosines, sines, `rope_style`, and the number of heads that the
# channels will be split into.
_RopeArguments = tuple[torch.Tensor, torch.Tensor, str, int]
# The arguments of a stock rotation in that form; `None` for a rotation that kernels do not support.
_RopeForm = Callable[..., "_RopeArguments | None"]


def _generic(
    x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
) -> _RopeArguments | None:
    """`diffusers.models.embeddings.apply_rotary_emb`: tables (sequence, head_dim), every value twice."""
    if not use_real or use_real_unbind_dim not in (-1, -2) or sequence_dim not in (1, 2) or x.ndim != 4:
        return None
    half = use_real_unbind_dim == -2
    tables = [item[..., : x.shape[-1] // 2] if half else item for item in freqs_cis]
    cos, sin = (item.unsqueeze(0).unsqueeze(3 - sequence_dim) for item in tables)
    return cos, sin, "half" if half else "interleaved", 0


def _own(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> _RopeArguments:
    """The rotation of Wan: cosines are read at even channels and sines at odd ones; both tables hold every value
    twice."""
    return cos, sin, "interleaved", 0


def _interleaved(x: torch.Tensor, freqs: Any) -> _RopeArguments:
    """The interleaved rotation of LTX-2: tables (batch, sequence, heads * head_dim), every value twice."""
    return *freqs, "interleaved", 0


def _complex(
    x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1
) -> _RopeArguments | None:
    """The rotation of Qwen-Image: complex tables (sequence, head_dim / 2)."""
    if use_real or x.ndim != 4:
        return None
    cos, sin = (item.repeat_interleave(2, dim=-1) for item in torch.view_as_real(freqs_cis).unbind(-1))
    return cos[None, :, None], sin[None, :, None], "interleaved", 0


def _by_heads(x: torch.Tensor, freqs: Any) -> _RopeArguments | None:
    """The rotation of LTX-2 by halves of a head: tables (batch, heads, sequence, head_dim / 2), heads in the channels
    of the tensor. Tables without heads rotate the halves of all channels, which kernels do not support."""
    if x.ndim != 3 or freqs[0].ndim != 4:
        return None
    cos, sin = (item.swapaxes(1, 2).flatten(2) for item in freqs)
    return cos, sin, "half", freqs[0].shape[1]


_ROPE = "apply_rotary_emb"
_ROPE_FORMS: dict[str, _RopeForm] = {
    _ROPE: _generic,
    "apply_rotary_emb_qwen": _complex,
    "apply_interleaved_rotary_emb": _interleaved,
    "apply_split_rotary_emb": _by_heads,
}


def _deferred_rope(stock: Callable[..., Any], form: _RopeForm, defer: bool, use_operator: bool) -> Callable[..., Any]:
    """A stock rotation that returns `DeferredQK` in eager code and calls an operator in compiled code, where kernels
    support its arguments."""

    def deferred(x: Any, *args: Any, **kwargs: Any) -> Any:
        def apply(item: Any) -> Any:
            return stock(item, *args, **kwargs)

        compiling = torch.compiler.is_compiling()
        # The operator has no gradient.
        wanted = (use_operator and not torch.is_grad_enabled()) if compiling else defer
        known = form(x, *args, **kwargs) if wanted else None
        if known is None:
            return apply(x)
        cos, sin, rope_style, heads = known
        if compiling:
            return apply_rope(x, cos, sin, rope_style, heads)
        return DeferredQK.rope(x, cos, sin, apply, rope_style, heads)

    return deferred


def _rebind_rope(call: types.FunctionType, scope: dict[str, Any], defer: bool, use_operator: bool) -> types.CodeType:
    """A processor's code with its rotation bound to a deferred one. The rotation may be a function of its module, an
    import inside the call, or a function defined inside the call."""
    code = call.__code__
    if _ROPE in code.co_names and _ROPE not in scope:
        code = _import_beforehand(call, code, scope)
    for name, form in _ROPE_FORMS.items():
        if name in code.co_names and callable(scope.get(name)):
            scope[name] = _deferred_rope(scope[name], form, defer, use_operator)
    constants = list(code.co_consts)
    own = next((item for item in constants if getattr(item, "co_name", None) == _ROPE), None)
    if own is None:
        return code
    scope["_diffusers_accel_rope"] = _deferred_rope(types.FunctionType(own, scope), _own, defer, use_operator)
    constants[constants.index(own)] = _own_rope.__code__
    return code.replace(co_consts=tuple(constants))


def _own_rope(hidden_states: Any, freqs_cos: Any, freqs_sin: Any) -> Any:
    return _diffusers_accel_rope(hidden_states, freqs_cos, freqs_sin)  # type: ignore[name-defined]  # noqa: F821


def _import_beforehand(function: types.FunctionType, code: types.CodeType, scope: dict[str, Any]) -> types.CodeType:
    """The code of a processor that imports its rotation inside the call, with the import moved out of the call. The
    rotation is then a global name that can be rebound and that Dynamo follows. Without source, `code` is returned."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return code
    definition: Any = tree.body[0]
    imports = [
        (body, node)
        for parent in ast.walk(definition)
        for body in (getattr(parent, "body", None), getattr(parent, "orelse", None))
        if isinstance(body, list)
        for node in body
        if isinstance(node, ast.ImportFrom) and [(item.name, item.asname) for item in node.names] == [(_ROPE, None)]
    ]
    for body, node in imports:
        name = "." * node.level + (node.module or "")
        scope[_ROPE] = getattr(importlib.import_module(name, function.__globals__.get("__package__")), _ROPE)
        body[body.index(node)] = ast.copy_location(ast.Pass(), node)
    if not imports:
        return code
    definition.decorator_list = []
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    module = compile(tree, code.co_filename, "exec", dont_inherit=True)
    return next(item for item in module.co_consts if getattr(item, "co_name", None) == function.__name__)
