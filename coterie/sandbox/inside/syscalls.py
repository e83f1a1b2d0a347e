"""The system calls that a program may make, and their numbers on x86_64 and aarch64.

What is not listed is refused: everything that starts a process or thread, executes a file, opens a socket, changes a file,
touches another process, or mounts, traces and loads. Where a call is listed in `restricted`, one of its arguments is looked at.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of the Linux sources.
"""

from __future__ import annotations

from dataclasses import dataclass

# name: (x86_64, aarch64), None where that architecture has no such call. The frequent ones first: a filter is read in order.
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "lseek": (8, 62),
    "close": (3, 57),
    "newfstatat": (262, 79),
    "fstat": (5, 80),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "brk": (12, 214),
    "futex": (202, 98),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "getdents64": (217, 61),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "preadv": (295, 69),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "statx": (332, 291),
    "getcwd": (79, 17),
    "umask": (95, 166),
    "dup": (32, 23),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "set_tid_address": (218, 96),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "stat": (4, None),
    "lstat": (6, None),
    "access": (21, None),
    "readlink": (89, None),
    "poll": (7, None),
    "select": (23, None),
    "pipe": (22, None),
    "dup2": (33, None),
    "epoll_wait": (232, None),
    "getpgrp": (111, None),
    "time": (201, None),
    "alarm": (37, None),
    "pause": (34, None),
    "arch_prctl": (158, None),
}

_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC: no file is opened to be changed
_DESCRIPTORS = (0, 1, 2, 3, 4, 1030, 1034)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX

_CLOCKS = tuple(range(12))  # CLOCK_REALTIME to CLOCK_TAI, the machine's own


@dataclass(frozen=True)
class Rule:
    """What an argument must be: one of `values`, or null, or without any of the bits of `without`."""

    values: tuple[int, ...] | None = None
    null: bool = False
    without: int = 0


Call = tuple[int, int | None]


def restricted(pid: int) -> list[tuple[Call, dict[int, Rule]]]:
    """Calls that are allowed to the process `pid` with some arguments: numbers, and for an argument's index its rule."""
    reading, itself = Rule(without=_WRITING), Rule(values=(pid,))
    own, clocks = Rule(values=(0, pid)), Rule(values=(*_CLOCKS, *_processor_clocks(0), *_processor_clocks(pid)))
    return [
        ((228, 113), {0: clocks}),  # clock_gettime
        ((230, 115), {0: clocks}),  # clock_nanosleep
        ((229, 114), {0: clocks}),  # clock_getres
        ((257, 56), {2: reading}),  # openat
        ((2, None), {1: reading}),  # open
        ((16, 29), {1: Rule(values=_TERMINAL)}),  # ioctl
        ((72, 25), {1: Rule(values=_DESCRIPTORS)}),  # fcntl
        ((302, 261), {0: own, 2: Rule(null=True)}),  # prlimit64, to ask for its own limits, not to set them
        ((204, 123), {0: own}),  # sched_getaffinity
        ((121, 155), {0: own}),  # getpgid
        ((124, 156), {0: own}),  # getsid
        ((62, 129), {0: itself}),  # kill
        ((200, 130), {0: itself}),  # tkill
        ((234, 131), {0: itself}),  # tgkill
    ]


def _processor_clocks(pid: int) -> list[int]:
    """The clocks that say how much of the processor a process, and a thread of that number, has had; 0 is the caller."""
    return [((~pid << 3) | kind) & 0xFFFFFFFF for kind in (0, 1, 2, 4, 5, 6)]
