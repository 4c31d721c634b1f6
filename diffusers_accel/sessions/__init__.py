"""Sessions: the edits in force on components, and the pipelines that asked for them.

Pipelines share components (`from_pipe`, a pipeline per request in a server, one text encoder for many), so an edit
belongs to the component that it changes.

- `session.py`: a `Session` has the edits of one `accelerate`. A pipeline with an accelerated denoiser runs through the
  denoiser's session, even if `accelerate` was not called with the pipeline.
- `shared_components.py`: the edits of a component besides the denoisers (a VAE, a text encoder), which several sessions
  may share.
- `copies.py`: a copy of a component or pipeline, deep or pickled, is stock and whole.
- `changes.py`: changes that users have made since a session began, found as a request begins.
"""

from .session import Session, forget_ended_session, session_of, session_of_denoisers
from .shared_components import ComponentSections, shared_components, undo_abandoned

__all__ = [
    "ComponentSections",
    "Session",
    "forget_ended_session",
    "session_of",
    "session_of_denoisers",
    "shared_components",
    "undo_abandoned",
]
