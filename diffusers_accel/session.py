"""Sessions: the edits in force on components, and the pipelines that asked for them.

An edit belongs to the component that it changes, since pipelines share components (`from_pipe`, a pipeline per request
in a server, one text encoder for many). A `Session` is what one `accelerate` did. It is kept on the denoisers
themselves and on the pipelines it was asked for, nowhere else, so it is freed with them. Edits of another component
(a VAE, a text encoder) are kept on that component, in a `Held`, which knows sessions only while others keep them.

- A pipeline that has an accelerated denoiser runs through its session, which reports of it and restores it, whether it
  was named in `accelerate` or not. Asked for the same configuration it joins; another is refused while it is shared.
- Another component that several sessions want alike is changed once, and stays so until the last of them ends. Where
  all were dropped without `restore`, the next `accelerate` or `restore` of a pipeline that has it finds it so.
- A copy, deep or pickled, is stock and whole: edits are undone while it is made.
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

# Where a denoiser keeps its session, and a pipeline the one it was asked for in.
SESSION = "_diffusers_accel_session"
# Where a pipeline keeps the edits of itself.
_OWN = "_diffusers_accel_edits"
# Where another component keeps its edits and the sessions that want them.
_HELD = "_diffusers_accel_held"

# Component -> feature -> its section, of components besides the denoisers.
Wanted = Mapping[str, Mapping[str, Any]]


@dataclass(eq=False)
class Session:
    """The edits of one `accelerate` on a pipeline's components.

    Args:
        config: The configuration.
        context: The pipeline as its features see it.
        notes: Sentences about it, as `explain` prints them.
        arguments: Those of `accelerate`, to be resolved again for a pipeline that has moved.
        weight_bytes_before: Bytes of the denoisers' weights in stock.
        wanted: Components that it changes besides the denoisers, with the sections that do.

    Attributes:
        journal: Its edits, but for those of the components in `besides`.
        besides: Components that it has changed besides the denoisers, by name.
        pipes: The pipelines it was asked for, while they exist.
        over: Whether it has been taken back.
        said: Warnings that need not be given again.
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
        return (type(None), ())  # a copy of what has one has none

    def begin(self, edits: Iterable[Edit], pipes: Iterable[Any]) -> None:
        """Applies edits, all or none of them.

        Args:
            edits: The edits that features yield.
            pipes: The pipelines that it is asked for.
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
        """Is asked for by a pipeline that has its denoisers."""
        # Named first: `end` looks at the pipelines that are, should this be interrupted.
        self.pipes.add(pipe)
        own = vars(pipe)[_OWN] = Journal()
        vars(pipe)[SESSION] = self
        own.apply(self._around(pipe))

    def end(self) -> None:
        """Takes everything back, for all pipelines that have its denoisers. Ctrl-C is raised when that is done."""
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
        """Names of pipelines' classes that it was asked for, this pipeline left out."""
        if any(each is not pipe for each in self.pipes):
            gc.collect()  # one that nobody has any more is no reason for anything
        return sorted(type(each).__name__ for each in self.pipes if each is not pipe)

    @contextmanager
    def suspended(self, what: str) -> Iterator[None]:
        """A context within which the components are stock.

        Args:
            what: The purpose, as an error names it.

        Raises:
            Unsupported: The stock weights are gone, or divided among ranks.
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
        """Why `end` could not take everything back."""
        alone = (held for held in self._helds if not [each for each in held.sessions if each is not self])
        return [*self.journal.irreversible, *(reason for held in alone for reason in held.journal.irreversible)]

    @property
    def edits(self) -> Iterator[Edit]:
        """The edits in force on its components."""
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
        """The edits of a pipeline itself."""
        context = self.context
        if hasattr(pipe, "check_inputs"):
            yield AddLayer(pipe, context.rank("request"), _arriving(self, weakref.ref(pipe)), "check_inputs")
        yield from _copies(pipe)
        # Notebooks ask an instance; a pipeline's own text is a page long.
        yield SetAttr(pipe, "_repr_mimebundle_", functools.partial(_one_line, self, type(pipe).__name__))

    def _release(self, name: str, module: nn.Module) -> None:
        """Wants a component changed no more; where others do, it stays so."""
        held = vars(module).get(_HELD)
        if not isinstance(held, Held) or self not in held.sessions:
            return
        others = [each for each in held.sessions if each is not self]
        if not others:
            held.let_go()
        # Last: interrupted before, `end` comes here again.
        held.sessions.discard(self)
        if not others:
            return
        kinds = ", ".join(sorted({type(pipe).__name__ for each in others for pipe in each.pipes}))
        warnings.warn(
            f"restore: {name} stays accelerated for {kinds or 'another pipeline'}, which shares it.", stacklevel=5
        )


def _one_line(session: Session, name: str, include: Any = None, exclude: Any = None) -> dict[str, str]:
    """A pipeline in a notebook: what it is, where, and what is in force on it."""
    on = [entry.name for entry in fields(session.config) if getattr(session.config, entry.name) is not None]
    where = session.context.device
    return {"text/plain": f"{name} on {where}, accelerated: {', '.join(on) or 'nothing'}. stats(pipe) tells more."}


@dataclass(eq=False)
class Held:
    """A component besides the denoisers that is changed.

    Args:
        module: The component.
        key: How it is changed: feature -> its section.

    Attributes:
        journal: Its edits.
        sessions: The sessions that want it so, while they exist.
    """

    module: weakref.ref[nn.Module]
    key: Mapping[str, Any]
    journal: Journal = field(default_factory=Journal)
    sessions: weakref.WeakSet[Session] = field(default_factory=weakref.WeakSet)

    def __reduce__(self) -> Any:
        return (type(None), ())

    def adopt(self, session: Session) -> None:
        """Takes over what a session has changed of the component."""
        self.sessions.add(session)
        module = self.module()
        assert module is not None
        inside = {id(part) for part in module.modules()}
        session.journal.transfer(self.journal, lambda edit: id(getattr(edit, "target", None)) in inside)

    def let_go(self) -> None:
        """Takes everything back."""
        self.journal.undo()
        module = self.module()
        if module is not None:
            vars(module).pop(_HELD, None)

    def others(self, session: Session | None) -> list[Session]:
        """The sessions besides one that want it so."""
        if any(each is not session for each in self.sessions):
            gc.collect()  # one that nobody has any more wants nothing
        return [each for each in self.sessions if each is not session]


def _held(module: nn.Module, key: Mapping[str, Any]) -> Held:
    found: Held = vars(module).setdefault(_HELD, Held(weakref.ref(module), key))
    return found


def let_go(module: Any) -> bool:
    """Takes back what is in force on a component that no session wants any more; whether there was anything.

    Raises:
        Unsupported: Its stock weights are gone; nothing was changed.
    """
    held = vars(module).get(_HELD)
    if not isinstance(held, Held) or held.others(None):
        return False
    for reason in held.journal.irreversible:
        raise Unsupported("restore", f"{reason}.", "load the component again.", type(module).__name__)
    held.let_go()
    return True


def abandoned(pipe: Any) -> bool:
    """Takes back what pipelines that were dropped without `restore` have left on components of this one; whether there
    was anything."""
    if not hasattr(pipe, "components"):
        return False  # no pipeline: the caller says so
    found = [let_go(module) for module in _components(pipe)]  # of each, whatever was on the one before
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
    """The session that is in force on a pipeline: its own, or that of a denoiser it shares."""
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
    """Whether a pipeline's session has been taken back through another one; forgets that it ever had it."""
    session = vars(pipe).pop(SESSION, None)
    return session is not None and session.over


def shared_with(pipe: Any, context: PipelineContext) -> Session | None:
    """The session that is in force on a pipeline's denoisers.

    Raises:
        Unsupported: Its denoisers are of several sessions, or some of none.
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
        own: The pipeline's own session, which makes way.

    Raises:
        Unsupported: Another session has changed one in another way.
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
    """A layer around the first thing a pipeline does in a request: waits for its turn, before anything is set."""

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session.context.clock.acquire()
        for look in list(session.context.outputs.request_hooks):
            look(pipe())
        # The session may have been replaced meanwhile. Then the layers around this call are other ones.
        found = vars(pipe()).get("check_inputs")
        if session.over and callable(found):
            return found(*args, **kwargs)
        return inner(*args, **kwargs)

    return check_inputs


# --- copies -----------------------------------------------------------------------------------------------------------


def _copies(owner: Any) -> Iterator[Edit]:
    """Has copies of a component or pipeline be stock. `copy` and `pickle` ask an instance before its class."""
    yield SetAttr(owner, "__deepcopy__", functools.partial(_deepcopy, owner))
    yield SetAttr(owner, "__reduce_ex__", functools.partial(_reduce, owner))


def _deepcopy(owner: Any, memo: Any = None) -> Any:
    with _stock(owner, "copy.deepcopy"):
        return copy.deepcopy(owner, memo)


def _reduce(owner: Any, protocol: Any = 4) -> Any:
    with _stock(owner, "pickle"):
        # Pickle reads the state later, when edits are in force again. So it gets a copy of the structure, on the same
        # tensors.
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
    """A tensor on the same memory that stays there when the first one's data is moved."""
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
