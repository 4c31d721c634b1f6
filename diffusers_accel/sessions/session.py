"""A session: the edits of one `accelerate`, and the pipelines that it was called with.

The session's denoisers and pipelines alone refer to it, so it is freed with them. Edits of another component are kept
on that component (`shared_components.py`).

A pipeline with an accelerated denoiser runs through the denoiser's session. A second configuration joins the session if
it is equal, and is refused while the denoiser is shared. Another component that several sessions change in the same way
is changed once, until the last of these sessions ends.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..config import AccelConfig
from ..core.edits import AddLayer, Edit, Journal, SetAttr
from ..errors import Unsupported
from ..features.context import PipelineContext
from .attributes import PIPELINE_EDITS, SESSION
from .copies import stock_copies
from .shared_components import ComponentSections, SharedComponent, suspended_component, undo_abandoned


@dataclass(eq=False)
class Session:
    """The edits of one `accelerate` on a pipeline's components.

    Args:
        config: The configuration.
        context: The pipeline as its features see it.
        notes: Sentences about the configuration, as `explain` prints them.
        arguments: The arguments of `accelerate`, resolved again for a pipeline that was moved to another device.
        weight_bytes_before: Bytes of the denoisers' stock weights.
        component_sections: Components to change besides the denoisers -> feature -> section.

    Attributes:
        journal: The session's edits, except edits of the components in `other_components`.
        other_components: Name -> changed component besides the denoisers.
        pipes: The pipelines that `accelerate` was called with, held weakly.
        ended: Whether the session has ended.
        warned: Warnings that were given already.
    """

    config: AccelConfig
    context: PipelineContext
    notes: tuple[str, ...]
    arguments: tuple[Any, Mapping[str, Any]]
    weight_bytes_before: int
    component_sections: ComponentSections = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    other_components: dict[str, nn.Module] = field(default_factory=dict)
    pipes: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    ended: bool = False
    warned: set[str] = field(default_factory=set)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copied component or pipeline has no session

    def begin(self, edits: Iterable[Edit], pipes: Iterable[Any]) -> None:
        """Applies edits, all or none of them.

        Args:
            edits: The edits that features yield.
            pipes: The pipelines that join the session.
        """
        components = self.context.pipe.components
        self.other_components = {name: components[name] for name in self.component_sections}
        try:
            for name, module in self.other_components.items():
                if name not in self.context.shared:
                    undo_abandoned(module)
            self.journal.apply(self._all(edits))
            for name, module in self.other_components.items():
                SharedComponent.around(module, self.component_sections[name]).adopt(self)
            for pipe in pipes:
                self.join(pipe)
        except BaseException:
            self.end()
            for pipe in list(self.pipes):
                forget_ended_session(pipe)
            raise

    def join(self, pipe: Any) -> None:
        """Adds a pipeline that has the session's denoisers, and applies the edits of the pipeline object."""
        # Added first: after an interruption `end` undoes the edits of every pipeline in `pipes`.
        self.pipes.add(pipe)
        own = vars(pipe)[PIPELINE_EDITS] = Journal()
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
        self.ended = True
        try:
            # The first edit may concern the whole pipeline (diffusers' own offloading, which comes back last).
            for name, module in self.other_components.items():
                self._release(name, module)
            self.journal.undo()
        finally:
            for pipe in list(self.pipes):
                own = vars(pipe).get(PIPELINE_EDITS)
                if own is not None and vars(pipe).get(SESSION, self) is self:
                    own.undo()
                    vars(pipe).pop(PIPELINE_EDITS, None)

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
            *(reason for shared in self._shared for reason in shared.journal.irreversible),
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
            for module in self.other_components.values():
                stack.enter_context(suspended_component(module))
            stack.enter_context(self.journal.suspended())
            yield

    @property
    def irreversible(self) -> list[str]:
        """The reasons why `end` could not undo all edits; empty if it can."""
        alone = (shared for shared in self._shared if not [each for each in shared.sessions if each is not self])
        return [*self.journal.irreversible, *(reason for shared in alone for reason in shared.journal.irreversible)]

    @property
    def edits(self) -> Iterator[Edit]:
        """The edits in force on the session's components."""
        yield from self.journal
        for shared in self._shared:
            yield from shared.journal

    @property
    def _shared(self) -> list[SharedComponent]:
        found = map(SharedComponent.of, self.other_components.values())
        return [shared for shared in found if shared is not None]

    @property
    def _name(self) -> str:
        return str(self.context)

    def _all(self, edits: Iterable[Edit]) -> Iterator[Edit]:
        for denoiser in self.context.denoisers:
            yield SetAttr(denoiser.module, SESSION, self)
            yield from stock_copies(denoiser.module)
        for name, module in self.other_components.items():
            if name not in self.context.shared:
                yield from stock_copies(module)
        yield from edits

    def _around(self, pipe: Any) -> Iterator[Edit]:
        """The edits of a pipeline object."""
        context = self.context
        if hasattr(pipe, "check_inputs"):
            yield AddLayer(pipe, context.rank("request"), _arriving(self, weakref.ref(pipe)), "check_inputs")
        yield from stock_copies(pipe)
        # Notebooks call this method of an instance. The stock text of a pipeline is a page long.
        yield SetAttr(pipe, "_repr_mimebundle_", functools.partial(_one_line, self, type(pipe).__name__))

    def _release(self, name: str, module: nn.Module) -> None:
        """Leaves a component's edits. The last session that leaves undoes them."""
        shared = SharedComponent.of(module)
        if shared is None or self not in shared.sessions:
            return
        others = [each for each in shared.sessions if each is not self]
        if not others:
            shared.undo()
        # Last: after an interruption before this line, `end` repeats the release.
        shared.sessions.discard(self)
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


def session_of(pipe: Any) -> Session | None:
    """The session in force on a pipeline: the pipeline's own, or a session of one of its denoisers."""
    own = vars(pipe).get(SESSION)
    if isinstance(own, Session) and not own.ended:
        return own
    found = _sessions(pipe)
    return found[0] if found else None


def _sessions(pipe: Any) -> list[Session]:
    """The sessions of a pipeline's components that are denoisers."""
    found: list[Session] = []
    for module in vars(pipe).values():
        session = vars(module).get(SESSION) if isinstance(module, nn.Module) else None
        if isinstance(session, Session) and not session.ended and session not in found:
            found.append(session)
    return found


def forget_ended_session(pipe: Any) -> bool:
    """Whether a pipeline's session has ended through another pipeline. The pipeline's reference to it is removed."""
    session = vars(pipe).pop(SESSION, None)
    return session is not None and session.ended


def session_of_denoisers(pipe: Any, context: PipelineContext) -> Session | None:
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


def _arriving(session: Session, pipe: Any) -> Callable[..., Any]:
    """A layer around `check_inputs`, a request's first method: waits in the request queue before the request begins."""

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session.context.clock.acquire()
        for look in list(session.context.outputs.request_hooks):
            look(pipe())
        # Another session may have replaced this one during the wait. Then this call needs the other session's layers.
        found = vars(pipe()).get("check_inputs")
        if session.ended and callable(found):
            return found(*args, **kwargs)
        return inner(*args, **kwargs)

    return check_inputs
