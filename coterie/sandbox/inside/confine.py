"""How a process gives up, for good, everything that a program of a model has no business with.

Landlock takes away reading and changing files, seccomp every system call that is not listed, resource limits bound what is left.
All of it goes through ctypes, so nothing has to be installed. The order matters: what a step needs must not be gone before it.
Sources: landlock(7), seccomp(2), capabilities(7), and the headers include/uapi/linux/{landlock,seccomp,filter,audit}.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable

from . import syscalls

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SECCOMP, _CAPSET = {"x86_64": (317, 126), "aarch64": (277, 91)}.get(platform.machine(), (-1, -1))
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on both architectures
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights over files each version of Landlock knows; later ones as the last
_FILE_RIGHTS = (0, 13, 14, 15, 15, 16)
_STACK = 64 << 20


class ConfineError(OSError):
    """The kernel refused one of the steps."""


def _call(what: str, number: int, *arguments: object) -> int:
    """A system call. Raises ConfineError with what it was for."""
    done = _libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        raise ConfineError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return int(done)


def _prctl(what: str, option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise ConfineError(f"{what}: {os.strerror(ctypes.get_errno())}")


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends. Exits at once where the parent, a process id, is gone already."""
    if platform.system() == "Linux":
        _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(*, cpu_seconds: int, address_space: int, open_files: int) -> None:
    """Hard limits of this process. address_space is in bytes."""
    limits = {
        "CPU": cpu_seconds, "AS": address_space, "NOFILE": open_files, "FSIZE": 0, "CORE": 0, "MEMLOCK": 0,
        "MSGQUEUE": 0, "SIGPENDING": 64, "STACK": _STACK,
    }  # fmt: skip
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """What root may do beyond others: gone, also for good, as nothing can be executed afterwards."""
    header = struct.pack("Ii", 0x20080522, 0)
    _call("capset", _CAPSET, header, struct.pack("6I", *[0] * 6))


def landlock_version() -> int:
    """0 where the kernel has none, or does not let it be used."""
    if platform.machine() not in ("x86_64", "aarch64") or platform.system() != "Linux":
        return 0
    return max(0, _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def make_ruleset(readable: Iterable[str]) -> int:
    """A file descriptor for `landlock`: under these files and folders reading, and nothing else anywhere."""
    version = landlock_version()
    if not version:
        raise ConfineError("Landlock: this kernel has none, or does not let it be used")
    rights = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS) - 1)]) - 1
    network, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", rights, network, scope)[:size]
    ruleset = _call("landlock_create_ruleset", _LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    for path in readable:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            allowed = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
            rule = struct.pack("=Qi", allowed, opened)
            _call(f"landlock_add_rule {path}", _LANDLOCK_ADD, ctypes.c_int(ruleset), 1, rule, ctypes.c_uint32(0))
        finally:
            os.close(opened)
    return ruleset


def no_new_privileges() -> None:
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)


def landlock(ruleset: int) -> None:
    _call("landlock_restrict_self", _LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))


def allow_only_listed_calls() -> None:
    """From here on every system call that is not in syscalls.py fails with EPERM, in this process until it ends."""
    program = make_filter(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _call("seccomp", _SECCOMP, ctypes.c_uint(1), ctypes.c_uint(0), header)


# Classic BPF: the instructions that the filter is made of, each (code, jump if true, jump if false, constant)
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # 1 is EPERM
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000  # numbers from here on are the same calls under another name

Instruction = tuple[int, int, int, int]


def make_filter(machine: str, pid: int) -> bytes:
    """The seccomp filter for `machine`, for the process `pid`: an array of struct sock_filter."""
    if machine not in _ARCHITECTURES:
        raise ConfineError(f"seccomp: no system call numbers are known for {machine}")
    column = list(_ARCHITECTURES).index(machine)
    lines: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE)]
    for numbers, rules in [*((numbers, {}) for numbers in syscalls.ALLOWED.values()), *syscalls.restricted(pid)]:
        number = numbers[column]
        if number is not None:  # else that architecture has no such call
            body = [line for argument, rule in rules.items() for line in _refuse_unless(argument, rule)]
            body.append((_RETURN, 0, 0, _ALLOW))
            lines += [(_EQUAL, 0, len(body), number), *body]  # all other calls go past it
    lines.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _refuse_unless(argument: int, rule: syscalls.Rule) -> list[Instruction]:
    """Refuse the call where the argument does not keep to the rule; go on where it does.

    The kernel reads 32 bits of all but pointers, so no more is compared.
    """
    low = _ARGUMENTS_AT + 8 * argument
    load, refuse = (_LOAD, 0, 0, low), (_RETURN, 0, 0, _REFUSE)
    if rule.values is not None:
        count = len(rule.values)
        return [load, *((_EQUAL, count - at, 0, value) for at, value in enumerate(rule.values)), refuse]
    if rule.null:
        return [load, (_EQUAL, 1, 0, 0), refuse, (_LOAD, 0, 0, low + 4), (_EQUAL, 1, 0, 0), refuse]
    return [load, (_ANY_BIT, 0, 1, rule.without), refuse]
