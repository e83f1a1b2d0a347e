"""Sandboxes on this machine: programs are forked from servers (server.py) that are confined in different ways."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

from coterie.processes import Crew
from coterie.sandbox.base import Outcome, Program, Sandbox, SandboxError
from coterie.sandbox.inside import confine
from coterie.sandbox.probes import can_compute, probe
from coterie.sandbox.server import ForkServer

_INSIDE = Path(__file__).parent / "inside"
_PACKAGES = ("site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip")


class Forked(Sandbox):
    """Fork servers, one for each program that runs at the same time; they are started when they are first needed."""

    name: ClassVar[str]

    def __init__(self, *, num_workers: int | None = None) -> None:
        """Raises SandboxError where this machine can't, or where a hostile program gets through."""
        super().__init__(num_workers or _num_cores())
        self._crew = Crew(self._start, num_workers or _num_cores())
        self._closed = False
        try:
            self.report = f"{self.name}: {self._test()}"
        except BaseException:
            self.close()
            raise

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        """How a server is started, and its options."""
        raise NotImplementedError

    def _test(self) -> str:
        return probe(self.run)

    def _start(self) -> ForkServer:
        command, options = self._command()
        return ForkServer(command, options, self._readable())

    def _readable(self) -> list[str]:
        """What a program may read: the standard library without the packages installed in it, and the time zones.

        No folder above them is among these: its rights would go for all below.
        """
        entries = [
            entry for folder in _libraries() for entry in sorted(folder.iterdir()) if entry.name not in _PACKAGES
        ]
        return [*map(str, entries), "/usr/share/zoneinfo", os.devnull]

    def run(self, program: Program) -> Outcome:
        if self._closed:
            return Outcome(failed="the sandbox is closed")
        try:
            with self._crew.server() as server:
                return server.run(program)
        except SandboxError as failure:
            return Outcome(failed=str(failure))

    def close(self) -> None:
        self._closed = True
        super().close()
        self._crew.close()


class Landlock(Forked):
    """Landlock, seccomp and resource limits: nothing to install, Linux 5.13 and later."""

    name = "landlock"

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        return _python(_INSIDE.parent), {"confined": True, "landlock": True, "parent": os.getpid()}


class Bubblewrap(Forked):
    """The same inside namespaces of its own: no network, no processes but its own, and only Python's own files to be seen."""

    name = "bubblewrap"

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        program = shutil.which("bwrap")
        if program is None:
            raise SandboxError("there is no bwrap; the package is called bubblewrap")
        landlock = confine.landlock_version() > 0
        options = {"confined": True, "landlock": landlock, "parent": None}
        return [program, *_namespaces(), *_mounts(), "--", *_python(Path("/guest"))], options


class Subprocess(Forked):
    """No confinement at all, resource limits only: a program may do whatever this user may. Only ever by name."""

    name = "subprocess"

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        return _python(_INSIDE.parent), {"confined": False, "landlock": False, "parent": os.getpid()}

    def _test(self) -> str:
        can_compute(self.run)
        return "asked for by name; it holds nothing"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _python(folder: Path) -> list[str]:
    """Python with nothing but its standard library, serving from `folder`/inside."""
    start = (
        f"import sys, json; sys.path.insert(0, {str(folder)!r}); from inside.fork_server import serve; del sys.path[0]; "
        "serve(json.loads(sys.argv[1]))"
    )
    return [_interpreter(), "-P", "-s", "-S", "-c", start]


def _libraries() -> list[Path]:
    """The folders of the standard library."""
    return sorted({Path(os.path.realpath(os.__file__)).parent, Path(os.path.realpath(sysconfig.get_path("stdlib")))})


def _namespaces() -> list[str]:
    """--unshare-user by name: as root, bwrap goes on without it otherwise."""
    return [
        "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--die-with-parent",
        "--new-session", "--hostname", "sandbox", "--chdir", "/",
    ]  # fmt: skip


def _mounts() -> list[str]:
    """Python and the shared libraries, read-only; no /proc, no /tmp, nothing that can be written."""
    words: list[str] = []
    bound: list[Path] = []
    for shared in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(shared):
            words += ["--symlink", os.readlink(shared), shared]
        elif os.path.isdir(shared):
            words += ["--ro-bind", shared, shared]
            bound.append(Path(shared))
    own = [Path(_interpreter()), *_libraries(), *(Path(sys.base_prefix) / "lib").glob("*.so*")]
    for path in own:
        if not any(path.is_relative_to(folder) for folder in bound):
            words += ["--ro-bind", str(path), str(path)]
    packages = [f"python*/{name}" for name in ("site-packages", "dist-packages")]
    folders = [*(found for folder in bound for name in packages for found in folder.glob(name)),
               *(folder / name for folder in _libraries() for name in _PACKAGES)]  # fmt: skip
    for folder in sorted({Path(os.path.realpath(folder)) for folder in folders if folder.is_dir()}):
        words += ["--size", "4096", "--tmpfs", str(folder), "--remount-ro", str(folder)]
    for extra in ("/etc/ld.so.cache", "/usr/share/zoneinfo"):
        words += ["--ro-bind-try", extra, extra]
    words += ["--dev-bind", os.devnull, os.devnull, "--ro-bind", str(_INSIDE), "/guest/inside", "--remount-ro", "/"]
    return words
