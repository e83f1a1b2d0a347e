"""The sandboxes that there are, and the strictest of them that holds hostile programs on this machine."""

from __future__ import annotations

import warnings

from coterie.errors import UserError, nearest
from coterie.sandbox.base import Sandbox, SandboxError
from coterie.sandbox.forked import Bubblewrap, Forked, Landlock, Subprocess


def make_sandbox(name: str = "auto", *, num_workers: int | None = None) -> Sandbox:
    """The sandbox of that name, tested with hostile programs; "auto" is the strictest that holds them on this machine.

    A URL is a sandbox server's. Raises UserError with the reasons where none holds: model-written code is never run in a plain
    process, unless "subprocess" is asked for by name. num_workers: programs at a time; one for each core where None.
    """
    if name.startswith(("http://", "https://")):
        from coterie.sandbox.remote import Remote  # which needs httpx; the others need nothing but Python

        return Remote(name, num_workers=num_workers)
    if name == "http":
        raise UserError("sandbox: http needs the address of a sandbox server; write sandbox: http://host:port")
    if name == "auto":
        return _first_that_holds(num_workers)
    if name not in SANDBOXES:
        raise UserError(
            f"sandbox: there is no {name!r}; {nearest(name, ['auto', *SANDBOXES])}, or a server's http address"
        )
    if name == "subprocess":
        warnings.warn(
            "sandbox: subprocess was asked for: model-written programs run with all of this user's rights", stacklevel=2
        )
    try:
        return SANDBOXES[name](num_workers=num_workers)
    except SandboxError as failure:
        raise UserError(f"sandbox: {name} can't be used here: {failure}") from failure


def _first_that_holds(num_workers: int | None) -> Sandbox:
    reasons = []
    for name in ("bubblewrap", "landlock"):
        try:
            return SANDBOXES[name](num_workers=num_workers)
        except SandboxError as failure:
            reasons.append(f"{name}: {failure}")
    raise UserError(
        "sandbox: model-written programs are not run, because nothing on this machine holds them. "
        f"{'; '.join(reasons)}. A sandbox server (sandbox: http://...) does it elsewhere; docs/sandbox.md says what is needed"
    )


SANDBOXES: dict[str, type[Forked]] = {"bubblewrap": Bubblewrap, "landlock": Landlock, "subprocess": Subprocess}
