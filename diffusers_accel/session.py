"""Sessions: the edits in force on components, and the pipelines that asked for them.

Pipelines share components (`from_pipe`, a pipeline per request in a server, one text encoder for many), so an edit
belongs to the component that it changes. A `Session` has the edits of one `accelerate`. Its denoisers and pipelines
alone refer to the session, so it is freed with them. Edits of another component (a VAE, a text encoder) are kept on
that component, in a `Held`, which refers to its sessions weakly.

- A pipeline with an accelerated denoiser runs through the denoiser's session, even if `accelerate` was not called with
  the pipeline. A second configuration joins the session if it is equal, and is refused while the denoiser is shared.
- Another component that several sessions change in the same way is changed once, until the last of these sessions ends.
  If all were dropped without `restore`, the next `accelerate` of a pipeline with it reuses or undoes the edits.
- A copy, deep or pickled, is stock and whole: edits are undone while the copy is made.
"""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from .compat.torch_private import buffers_of, parameters_of
from .config import AccelConfig
from .core.edits import AddLayer, Edit, Journal, SetAttr
from .errors import Unsupported
from .features.context import PipelineContext

# The attribute in which a denoiser or a pipeline keeps its session.
SESSION = "_diffusers_accel_session"
# The attribute in which a pipeline keeps the edits of the pipeline object.
_OWN = "_diffusers_accel_edits"
# The attribute in which another component keeps its `Held`.
_HELD = "_diffusers_accel_held"

# Component -> feature -> its section, of components besides the denoisers.
Wanted = Mapping[str, Mapping[str, Any]]


@dataclass(eq=False)
class Session:
    """The edits of one `accelerate` on a pipeline's components.

    Args:
        config: The configuration.
        context: The pipeline as its features see it.
        notes: Sentences about the configuration, as `explain` prints them.
        arguments: The arguments of `accelerate`, resolved again for a pipeline that was moved to another device.
        weight_bytes_before: Bytes of the denoisers' stock weights.
        wanted: Components to change besides the denoisers -> feature -> section.

    Attributes:
        journal: The session's edits, except edits of the components in `besides`.
        besides: Name -> changed component besides the denoisers.
        pipes: The pipelines that `accelerate` was called with, held weakly.
        over: Whether the session has ended.
        said: Warnings that were given already.
    """

    config: AccelConfig
    context: PipelineContext
    notes: tuple[str, ...]
    arguments: tuple[Any, Mapping[str, Any]]
    weight_bytes_before: int
    wanted: Wanted = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    besides: dict[str, nn.Module] = field(default_factory=dict)
    pipes: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    over: bool = False
    said: set[str] = field(default_factory=set)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copied component or pipeline has no session

    def begin(self, edits: Iterable[Edit], pipes: Iterable[Any]) -> None:
        """Applies edits, all or none of them.

        Args:
            edits: The edits that features yield.
            pipes: The pipelines that join the session.
        """
        components = self.context.pipe.components
        self.besides = {name: components[name] for name in self.wanted}
        try:
            for name, module in self.besides.items():
                if name not in self.context.shared:
                    let_go(module)
            self.journal.apply(self._all(edits))
            for name, module in self.besides.items():
                _held(module, self.wanted[name]).adopt(self)
            for pipe in pipes:
                self.join(pipe)
        except BaseException:
            self.end()
            for pipe in list(self.pipes):
                dropped(pipe)
            raise

    def join(self, pipe: Any) -> None:
        """Adds a pipeline that has the session's denoisers, and applies the edits of the pipeline object."""
        # Added first: after an interruption `end` undoes the edits of every pipeline in `pipes`.
        self.pipes.add(pipe)
        own = vars(pipe)[_OWN] = Journal()
        vars(pipe)[SESSION] = self
        own.apply(self._around(pipe))

    def end(self) -> None:
        """Undoes all edits, for all pipelines with the session's denoisers. Ctrl-C is raised after the last undo."""
        try:
            self._end()
        except KeyboardInterrupt:
            self.end()
            raise

    def _end(self) -> None:
        self.over = True
        try:
            self.journal.undo()
            for name, module in self.besides.items():
                self._release(name, module)
        finally:
            for pipe in list(self.pipes):
                own = vars(pipe).get(_OWN)
                if own is not None and vars(pipe).get(SESSION, self) is self:
                    own.undo()
                    vars(pipe).pop(_OWN, None)

    def others(self, pipe: Any) -> list[str]:
        """Class names of the session's pipelines except this one."""
        if any(each is not pipe for each in self.pipes):
            gc.collect()  # removes pipelines that only reference cycles keep
        return sorted(type(each).__name__ for each in self.pipes if each is not pipe)

    @contextmanager
    def suspended(self, what: str) -> Iterator[None]:
        """A context within which the components are stock.

        Args:
            what: The purpose, as an error names it.

        Raises:
            Unsupported: The stock weights were freed, or are sharded among ranks.
        """
        reasons = [
            *self.journal.irreversible,
            *(reason for held in self._helds for reason in held.journal.irreversible),
        ]
        parallel = self.config.parallel
        if parallel is not None and (parallel.tp > 1 or parallel.fsdp):
            reasons = ["its weights are divided among ranks"]
        if reasons:
            raise Unsupported(
                what, f"{reasons[0]}.", "save_quantized(pipe, ...), or load the pipeline again.", self._name
            )
        self.context.clock.wait_idle()
        with ExitStack() as stack:
            for module in self.besides.values():
                stack.enter_context(_suspended(module))
            stack.enter_context(self.journal.suspended())
            yield

    @property
    def irreversible(self) -> list[str]:
        """The reasons why `end` could not undo all edits; empty if it can."""
        alone = (held for held in self._helds if not [each for each in held.sessions if each is not self])
        return [*self.journal.irreversible, *(reason for held in alone for reason in held.journal.irreversible)]

    @property
    def edits(self) -> Iterator[Edit]:
        """The edits in force on the session's components."""
        yield from self.journal
        for held in self._helds:
            yield from held.journal

    @property
    def _helds(self) -> list[Held]:
        found = (vars(module).get(_HELD) for module in self.besides.values())
        return [held for held in found if isinstance(held, Held)]

    @property
    def _name(self) -> str:
        return str(self.context)

    def _all(self, edits: Iterable[Edit]) -> Iterator[Edit]:
        for denoiser in self.context.denoisers:
            yield SetAttr(denoiser.module, SESSION, self)
            yield from _copies(denoiser.module)
        for name, module in self.besides.items():
            if name not in self.context.shared:
                yield from _copies(module)
        yield from edits

    def _around(self, pipe: Any) -> Iterator[Edit]:
        """The edits of a pipeline object."""
        context = self.context
        if hasattr(pipe, "check_inputs"):
            yield AddLayer(pipe, context.rank("request"), _arriving(self, weakref.ref(pipe)), "check_inputs")
        yield from _copies(pipe)
        # Notebooks call this method of an instance. The stock text of a pipeline is a page long.
        yield SetAttr(pipe, "_repr_mimebundle_", functools.partial(_one_line, self, type(pipe).__name__))

    def _release(self, name: str, module: nn.Module) -> None:
        """Leaves a component's `Held`. The last session that leaves undoes the component's edits."""
        held = vars(module).get(_HELD)
        if not isinstance(held, Held) or self not in held.sessions:
            return
        others = [each for each in held.sessions if each is not self]
        if not others:
            held.let_go()
        # Last: after an interruption before this line, `end` repeats the release.
        held.sessions.discard(self)
        if not others:
            return
        kinds = ", ".join(sorted({type(pipe).__name__ for each in others for pipe in each.pipes}))
        warnings.warn(
            f"restore: {name} stays accelerated for {kinds or 'another pipeline'}, which shares it.", stacklevel=5
        )


def _one_line(session: Session, name: str, include: Any = None, exclude: Any = None) -> dict[str, str]:
    """A pipeline's text in a notebook: its class, its device and the sections in force."""
    on = [entry.name for entry in fields(session.config) if getattr(session.config, entry.name) is not None]
    where = session.context.device
    return {"text/plain": f"{name} on {where}, accelerated: {', '.join(on) or 'nothing'}. stats(pipe) tells more."}


@dataclass(eq=False)
class Held:
    """The edits of a component besides the denoisers, and the sessions that share them.

    Args:
        module: The component, held weakly.
        key: Feature -> section, of the features that change the component.

    Attributes:
        journal: The component's edits.
        sessions: The sessions with this `key` for the component, held weakly.
    """

    module: weakref.ref[nn.Module]
    key: Mapping[str, Any]
    journal: Journal = field(default_factory=Journal)
    sessions: weakref.WeakSet[Session] = field(default_factory=weakref.WeakSet)

    def __reduce__(self) -> Any:
        return (type(None), ())

    def adopt(self, session: Session) -> None:
        """Adds a session, and moves the session's edits of the component to this journal."""
        self.sessions.add(session)
        module = self.module()
        assert module is not None
        inside = {id(part) for part in module.modules()}
        session.journal.transfer(self.journal, lambda edit: id(getattr(edit, "target", None)) in inside)

    def let_go(self) -> None:
        """Undoes the component's edits, and removes this object from the component."""
        self.journal.undo()
        module = self.module()
        if module is not None:
            vars(module).pop(_HELD, None)

    def others(self, session: Session | None) -> list[Session]:
        """The sessions in `sessions` except one."""
        if any(each is not session for each in self.sessions):
            gc.collect()  # removes sessions that only reference cycles keep
        return [each for each in self.sessions if each is not session]


def _held(module: nn.Module, key: Mapping[str, Any]) -> Held:
    found: Held = vars(module).setdefault(_HELD, Held(weakref.ref(module), key))
    return found


def let_go(module: Any) -> bool:
    """Undoes a component's edits if all of its sessions were dropped without `restore`. Returns whether it had edits.

    Raises:
        Unsupported: The component's stock weights were freed; nothing was changed.
    """
    held = vars(module).get(_HELD)
    if not isinstance(held, Held) or held.others(None):
        return False
    for reason in held.journal.irreversible:
        raise Unsupported("restore", f"{reason}.", "load the component again.", type(module).__name__)
    held.let_go()
    return True


def abandoned(pipe: Any) -> bool:
    """Undoes edits on this pipeline's components whose pipelines were all dropped without `restore`. Returns whether
    there were any."""
    if not hasattr(pipe, "components"):
        return False  # no pipeline: the caller says so
    found = [let_go(module) for module in _components(pipe)]  # a list, so that `any` skips no component
    return any(found)


@contextmanager
def _suspended(module: nn.Module) -> Iterator[None]:
    """A context within which a component besides the denoisers is stock."""
    held = vars(module).pop(_HELD, None)
    if not isinstance(held, Held):
        yield
        return
    try:
        with held.journal.suspended():
            yield
    finally:
        vars(module)[_HELD] = held


def session_of(pipe: Any) -> Session | None:
    """The session in force on a pipeline: the pipeline's own, or a session of one of its denoisers."""
    own = vars(pipe).get(SESSION)
    if isinstance(own, Session) and not own.over:
        return own
    found = _sessions(pipe)
    return found[0] if found else None


def _sessions(pipe: Any) -> list[Session]:
    """The sessions of a pipeline's components that are denoisers."""
    found: list[Session] = []
    for module in vars(pipe).values():
        session = vars(module).get(SESSION) if isinstance(module, nn.Module) else None
        if isinstance(session, Session) and not session.over and session not in found:
            found.append(session)
    return found


def dropped(pipe: Any) -> bool:
    """Whether a pipeline's session has ended through another pipeline. The pipeline's reference to it is removed."""
    session = vars(pipe).pop(SESSION, None)
    return session is not None and session.over


def shared_with(pipe: Any, context: PipelineContext) -> Session | None:
    """The session that is in force on a pipeline's denoisers.

    Raises:
        Unsupported: The denoisers have several sessions, or some have none.
    """
    session = session_of(pipe)
    if session is None:
        return None
    owned = {id(denoiser.module) for denoiser in session.context.denoisers}
    here = {id(denoiser.module) for denoiser in context.denoisers}
    several = len(_sessions(pipe)) > 1
    if several or (owned != here and (not owned <= here or session.others(pipe))):
        names = session.others(pipe) or ["another pipeline"]
        raise Unsupported(
            "accelerate",
            f"it shares some of its denoisers with {', '.join(names)}, which is accelerated.",
            "restore(pipe), which takes that back for all that share them, then accelerate(pipe, ...).",
            type(pipe).__name__,
        )
    return session


def shared_components(context: PipelineContext, wanted: Wanted, own: Session | None) -> frozenset[str]:
    """Components that another session has changed in the same way already.

    Args:
        context: The pipeline.
        wanted: Components to change besides the denoisers, with the sections that do.
        own: The pipeline's own session, which ends first.

    Raises:
        Unsupported: Another session has changed such a component in another way.
    """
    found = set()
    for name, key in wanted.items():
        held = vars(context.pipe.components[name]).get(_HELD)
        if not isinstance(held, Held) or (own is not None and set(held.sessions) == {own}):
            continue
        others = held.others(own)
        if held.key != key and others:
            kinds = sorted(type(pipe).__name__ for each in others for pipe in each.pipes) or ["another pipeline"]
            features = ", ".join(sorted(set(key) | set(held.key)))
            raise Unsupported(
                features,
                f"its {name} is shared with {', '.join(kinds)}, for which it was set otherwise.",
                f"the same setting for both, or restore(...) the other one, or a {name} of its own.",
                type(context.pipe).__name__,
            )
        if held.key == key:
            found.add(name)
    return frozenset(found)


def _arriving(session: Session, pipe: Any) -> Callable[..., Any]:
    """A layer around `check_inputs`, a request's first method: waits in the request queue before the request begins."""

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session.context.clock.acquire()
        for look in list(session.context.outputs.request_hooks):
            look(pipe())
        # Another session may have replaced this one during the wait. Then this call needs the other session's layers.
        found = vars(pipe()).get("check_inputs")
        if session.over and callable(found):
            return found(*args, **kwargs)
        return inner(*args, **kwargs)

    return check_inputs


# --- copies -----------------------------------------------------------------------------------------------------------


def _copies(owner: Any) -> Iterator[Edit]:
    """Edits that make copies of a component or pipeline stock. `copy` and `pickle` prefer an instance's method."""
    yield SetAttr(owner, "__deepcopy__", functools.partial(_deepcopy, owner))
    yield SetAttr(owner, "__reduce_ex__", functools.partial(_reduce, owner))


def _deepcopy(owner: Any, memo: Any = None) -> Any:
    with _stock(owner, "copy.deepcopy"):
        return copy.deepcopy(owner, memo)


def _reduce(owner: Any, protocol: Any = 4) -> Any:
    with _stock(owner, "pickle"):
        # Pickle reads the state later, when edits are in force again. It therefore gets a copy of the structure with
        # the same tensors.
        modules = [owner] if isinstance(owner, nn.Module) else _components(owner)
        tensors = [
            item
            for module in modules
            for part in module.modules()
            for item in (*parameters_of(part).values(), *buffers_of(part).values())
            if item is not None
        ]
        return copy.deepcopy(owner, {id(item): _apart(item) for item in tensors}).__reduce_ex__(protocol)


def _apart(item: torch.Tensor) -> torch.Tensor:
    """A second tensor on the same memory, which keeps the memory when the first tensor's data is moved."""
    if isinstance(item, nn.Parameter):
        return nn.Parameter(item.data, requires_grad=item.requires_grad)
    return item.detach()


def _components(pipe: Any) -> list[nn.Module]:
    return [item for item in pipe.components.values() if isinstance(item, nn.Module)]


@contextmanager
def _stock(owner: Any, what: str) -> Iterator[None]:
    """A context within which a component or pipeline is stock."""
    modules = [owner] if isinstance(owner, nn.Module) else _components(owner)
    found = [vars(module)[SESSION] for module in modules if SESSION in vars(module)]
    with ExitStack() as stack:
        own: Journal | None = vars(owner).get(_OWN)
        if own is not None:
            for name in (SESSION, _OWN):
                stack.callback(vars(owner).__setitem__, name, vars(owner).pop(name))
            stack.enter_context(own.suspended())
        for session in dict.fromkeys(found):
            if not session.over:
                stack.enter_context(session.suspended(what))
        for module in modules:
            held = vars(module).get(_HELD)
            if isinstance(held, Held):
                for reason in held.journal.irreversible:
                    raise Unsupported(what, f"{reason}.", "load the component again.", type(module).__name__)
                stack.enter_context(_suspended(module))
        yield
