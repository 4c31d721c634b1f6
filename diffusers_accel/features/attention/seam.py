"""The seam between stock attention processors and a site of ours. Names private to diffusers' dispatcher appear here
only.

Two ways in. A stock processor that carries `_attention_backend` hands it to diffusers' dispatcher, so it is given a
backend of ours on the instance: the process-wide setting, which diffusers' own setter changes for every pipeline, is
left alone. A processor without it (SD3, Cosmos 1 and 2, and most classes outside the table) is replaced by one that
runs the *stock code* with a single global name bound to our kernel: no source is copied, and the stock processor
comes back with `restore`.

Where a kernel folds QK-norm and rotation, the stock code also finds functions that put them off (`Pending`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.edits import Edit, SetAttr
from ...errors import Unsupported
from ...kernels.attention import SITES, AttentionSite, Pending, enter, rotate

# Of our backends' names, before a site's number.
_PREFIX = "diffusers_accel"


@dataclass(eq=False)
class SetProcessor(SetAttr):
    """Sets a copy of an attention module's processor. What its user sets on the copy is the stock processor's, when
    that comes back."""

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


def dispatcher_backend(site: AttentionSite) -> tuple[Any, list[Edit]]:
    """A backend name of ours, and the edits that enter it in the dispatcher's tables; they come before the site is
    entered in `SITES`.

    The tables hold no pipeline. Should one be dropped that was never restored, what was entered for it goes with it.
    """
    weakref.finalize(site, _sweep).atexit = False
    return _backend(site.number)[0], [_Enter(site.number)]


@dataclass(eq=False)
class _Enter:
    """Enters the backend of a site's number in the dispatcher's tables, if it is not there."""

    number: int

    def apply(self) -> None:
        member, attention = _backend(self.number)
        arguments = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
        for table, entry in zip(_tables(), (attention, [], arguments | {"_parallel_config"}), strict=True):
            table.setdefault(member, entry)

    def undo(self) -> None:
        _sweep()


def _tables() -> tuple[dict[Any, Any], ...]:
    """The dispatcher's: functions, constraints and names of arguments, by backend."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    return registry._backends, registry._constraints, registry._supported_arg_names


def _sweep() -> None:
    """Takes backends of numbers that no site has out of the dispatcher's tables, from the end.

    Compiled graphs know a backend by its place in a table. One that stands before another pipeline's stays until that
    is gone, or the other's graphs would be compiled again. Nothing is taken out while Dynamo looks at the tables.
    """
    if torch._guards.CompileContext.try_get() is not None:
        return
    for member in reversed(list(_tables()[0])):
        prefix, _, number = str(getattr(member, "_value_", "")).rpartition("_")
        if prefix != _PREFIX or int(number) in SITES:
            return
        for table in _tables():
            table.pop(member, None)


@functools.cache
def _backend(number: int) -> tuple[Any, Callable[..., Any]]:
    """The backend name of a site's number, and the function behind it: compiled graphs know both by identity, so they
    are the same for every site that has the number.

    The name is an instance of the dispatcher's enumeration that is not one of its members: the class stays as it is.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    value = f"{_PREFIX}_{number}"
    member: Any = str.__new__(AttentionBackendName, value)
    member._name_, member._value_ = value, value

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        _refuse_neighbours(_parallel_config)
        return enter(number, query, key, value, attn_mask, is_causal, scale)

    return member, attention


def _refuse_neighbours(given: Any) -> None:
    """Refuses context parallelism switched on after us, or one backend's arguments: ignored, they would do harm."""
    if given:
        raise Unsupported(
            "attention",
            "diffusers' context parallelism or backend arguments reached an accelerated attention layer.",
            "restore(pipe) before using them.",
        )


# --- processors that call attention themselves ----------------------------------------------------------------------


def calls_by_name(processor: Any) -> bool:
    """Whether the processor's code reaches attention through a global name that can be bound anew."""
    call = vars(type(processor)).get("__call__")
    if not isinstance(call, types.FunctionType):
        return False
    call = inspect.unwrap(call)
    names, scope = call.__code__.co_names, call.__globals__
    # A processor of ours is judged as the stock one it runs, so that a second `accelerate` is checked like the first.
    functional = scope.get("F") is F or isinstance(scope.get("F"), _Functional)
    return "dispatch_attention_fn" in names or ("scaled_dot_product_attention" in names and functional)


class _Functional:
    """`torch.nn.functional` with one function of ours."""

    def __init__(self, attention: Callable[..., Any]):
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


@functools.cache
def rebound_class(stock: type, number: int, fold: bool = False, mark: bool = False) -> type:
    """A subclass of a stock processor that runs the stock code with its attention function bound to a site.

    It is made once: compiled graphs know a class by identity, and would be made anew for each. It holds no pipeline.

    Args:
        stock: Its class.
        number: Of the site that attention enters.
        fold: Let query and key reach it with their norm and rotation still to be done, in eager.
        mark: Have rotations be operators that a rewrite finds, in compiled graphs.
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
        _refuse_neighbours(parallel_config or attention_kwargs)
        return enter(number, query, key, value, attn_mask, is_causal, scale)

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
        return enter(number, query, key, value, attn_mask, is_causal, scale).transpose(1, 2)

    scope = dict(call.__globals__)
    # Dynamo looks a function's globals up in the module that `__name__` names; without it, in the dictionary itself.
    scope.pop("__name__", None)
    scope["dispatch_attention_fn"] = dispatched
    scope["F"] = _Functional(heads_first)
    if fold or mark:
        code = _rotation_put_off(call, scope, fold, mark)
    function = types.FunctionType(code, scope, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    function.__module__ = stock.__module__
    whole: Callable[..., Any] = _norms_put_off(function) if fold else function

    def made(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Others that are made of its class (`load_ip_adapter` does so, and copies) are stock."""
        return stock(*args, **kwargs)

    return type(stock.__name__, (stock,), {"__call__": whole, "__module__": stock.__module__, "__new__": made})


class _NormsPutOff:
    """An attention module whose QK-norms return `Pending`; everything else is the module's own."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ("norm_q", "norm_k") or not _is_rms_norm(found):
            return found
        return lambda x: Pending.normed(x, found.weight, found.eps, found)


def _is_rms_norm(module: Any) -> bool:
    """Whether it is a stock RMS norm that nobody hooked or replaced: such a one is called as it is."""
    from diffusers.models.normalization import RMSNorm

    if type(module) not in (nn.RMSNorm, RMSNorm) or getattr(module, "bias", None) is not None:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _norms_put_off(function: types.FunctionType) -> Callable[..., Any]:
    """A processor's call whose QK-norms are put off, unless it joins two streams between norm and attention."""

    @functools.wraps(function)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and getattr(attn, "added_kv_proj_dim", None) is None:
            attn = _NormsPutOff(attn)
        return function(self, attn, *args, **kwargs)

    return call


# What a stock rotation's arguments after the tensor say: cosines and sines for `Pending.rotated`, whether parts are
# halves, and in how many heads the channels will be split. `None` for a form that kernels do not know.
_Known = tuple[torch.Tensor, torch.Tensor, bool, int]
_Form = Callable[..., "_Known | None"]


def _generic(
    x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
) -> _Known | None:
    """`diffusers.models.embeddings.apply_rotary_emb`: tables (sequence, head_dim), every value twice."""
    if not use_real or use_real_unbind_dim not in (-1, -2) or sequence_dim not in (1, 2) or x.ndim != 4:
        return None
    halves = use_real_unbind_dim == -2
    tables = [item[..., : x.shape[-1] // 2] if halves else item for item in freqs_cis]
    cos, sin = (item.unsqueeze(0).unsqueeze(3 - sequence_dim) for item in tables)
    return cos, sin, halves, 0


def _own(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> _Known:
    """Wan's: it reads cosines at even channels and sines at odd ones; both hold every value twice."""
    return cos, sin, False, 0


def _interleaved(x: torch.Tensor, freqs: Any) -> _Known:
    """LTX-2's: tables (batch, sequence, heads * head_dim), every value twice."""
    return *freqs, False, 0


def _complex(x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1) -> _Known | None:
    """Qwen-Image's: complex tables (sequence, head_dim / 2)."""
    if use_real or x.ndim != 4:
        return None
    cos, sin = (item.repeat_interleave(2, dim=-1) for item in torch.view_as_real(freqs_cis).unbind(-1))
    return cos[None, :, None], sin[None, :, None], False, 0


def _split(x: torch.Tensor, freqs: Any) -> _Known | None:
    """LTX-2's by halves: tables (batch, heads, sequence, head_dim / 2), while the tensor's heads lie in its channels.
    Tables without heads split all channels into two halves."""
    if x.ndim != 3 or freqs[0].ndim != 4:
        return None
    cos, sin = (item.swapaxes(1, 2).flatten(2) for item in freqs)
    return cos, sin, True, freqs[0].shape[1]


_ROTATION = "apply_rotary_emb"
_FORMS: dict[str, _Form] = {
    _ROTATION: _generic,
    "apply_rotary_emb_qwen": _complex,
    "apply_interleaved_rotary_emb": _interleaved,
    "apply_split_rotary_emb": _split,
}


def _put_off(stock: Callable[..., Any], form: _Form, fold: bool, mark: bool) -> Callable[..., Any]:
    """A stock rotation that returns `Pending`, or an operator in a compiled graph, where its form is one that kernels
    know."""

    def put_off(x: Any, *args: Any, **kwargs: Any) -> Any:
        def apply(item: Any) -> Any:
            return stock(item, *args, **kwargs)

        compiling = torch.compiler.is_compiling()
        # The operator knows no gradient.
        wanted = (mark and not torch.is_grad_enabled()) if compiling else fold
        known = form(x, *args, **kwargs) if wanted else None
        if known is None:
            return apply(x)
        cos, sin, halves, heads = known
        if compiling:
            return rotate(x, cos, sin, halves, heads)
        return Pending.rotated(x, cos, sin, apply, halves, heads)

    return put_off


def _rotation_put_off(call: types.FunctionType, scope: dict[str, Any], fold: bool, mark: bool) -> types.CodeType:
    """A processor's code whose rotation is put off: a function of its module, one that it imports when it is called, or
    one that it defines itself."""
    code = call.__code__
    if _ROTATION in code.co_names and _ROTATION not in scope:
        code = _import_outside(call, code, scope)
    for name, form in _FORMS.items():
        if name in code.co_names and callable(scope.get(name)):
            scope[name] = _put_off(scope[name], form, fold, mark)
    constants = list(code.co_consts)
    own = next((item for item in constants if getattr(item, "co_name", None) == _ROTATION), None)
    if own is None:
        return code
    scope["_diffusers_accel_put_off"] = _put_off(types.FunctionType(own, scope), _own, fold, mark)
    constants[constants.index(own)] = _own_rotation.__code__
    return code.replace(co_consts=tuple(constants))


def _own_rotation(hidden_states: Any, freqs_cos: Any, freqs_sin: Any) -> Any:
    return _diffusers_accel_put_off(hidden_states, freqs_cos, freqs_sin)  # type: ignore[name-defined]  # noqa: F821


def _import_outside(function: types.FunctionType, code: types.CodeType, scope: dict[str, Any]) -> types.CodeType:
    """The code of a processor that imports its rotation when it is called, with the import done beforehand: the name is
    a global one then, which can be bound anew, and which Dynamo follows. As it was where there is no source."""
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
        if isinstance(node, ast.ImportFrom) and [(item.name, item.asname) for item in node.names] == [(_ROTATION, None)]
    ]
    for body, node in imports:
        name = "." * node.level + (node.module or "")
        scope[_ROTATION] = getattr(importlib.import_module(name, function.__globals__.get("__package__")), _ROTATION)
        body[body.index(node)] = ast.copy_location(ast.Pass(), node)
    if not imports:
        return code
    definition.decorator_list = []
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    module = compile(tree, code.co_filename, "exec", dont_inherit=True)
    return next(item for item in module.co_consts if getattr(item, "co_name", None) == function.__name__)
