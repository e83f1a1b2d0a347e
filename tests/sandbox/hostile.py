"""Hostile programs, run in a sandbox by whoever runs this file: `python hostile.py BACKEND` prints what got through, as JSON.

A process of its own, because it also plays the trainer that they attack: its secrets, its memory, the processes and sockets beside it.
`attacked` has it run, also as another user. Needs no pytest and no torch.
"""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import coterie
from coterie.errors import UserError
from coterie.sandbox.base import Limits, Program
from coterie.sandbox.make import make_sandbox

NOBODY = 65534
ROOT = Path(coterie.__file__).parent.parent
SECRET = "a-secret-4711"
HEAD = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(what, function, *arguments):
    try:
        result = function(*arguments)
    except BaseException:
        return
    done.append([what, repr(result)[:200]])
def call(what, name, *arguments):
    if getattr(libc, name)(*arguments) != -1:
        done.append([what, "succeeded"])
def number(what, x86_64, aarch64, *arguments):
    import platform
    n = x86_64 if platform.machine() == "x86_64" else aarch64
    if libc.syscall(ctypes.c_long(n), *arguments) != -1:
        done.append([what, "succeeded"])
"""
# Each defines attack(info) and returns what it got: [] where everything was refused. info: pid, victim, folder, secret, port, local
PROGRAMS = {
    "fork bomb": """
def attack(info):
    for _ in range(200):
        attempt("fork", os.fork)
        attempt("vfork", lambda: libc.vfork() if libc.vfork() != -1 else 1 / 0)
        attempt("posix_spawn", os.posix_spawn, "/bin/sh", ["sh", "-c", "sleep 100"], {})
        attempt("subprocess", subprocess.Popen, ["sleep", "100"])
    return done
""",
    "thread bomb": """
def attack(info):
    for _ in range(200):
        attempt("thread", threading.Thread(target=time.sleep, args=(100,)).start)
    return done
""",
    "clone by number": """
def attack(info):
    number("clone", 56, 220, 17, 0, 0, 0, 0)
    number("clone3", 435, 435, ctypes.create_string_buffer(88), 88)
    number("x32 fork", 0x40000000 + 57, 9999)
    return done
""",
    "memory": """
def attack(info):
    held = []
    try:
        for _ in range(40):
            held.append(bytearray(os.urandom(1)) * (50 << 20))
    except MemoryError:
        pass
    got = len(held) * 50
    del held
    return ["%d MB" % got] if got > 300 else []
""",
    "memory beside the heap": """
def attack(info):
    import mmap
    attempt("mmap", lambda: mmap.mmap(-1, 2 << 30))
    attempt("memfd", lambda: os.ftruncate(os.memfd_create("x"), 1 << 30))
    number("shmget", 29, 194, 0, 1 << 30, 0o1666)
    attempt("shm_open", lambda: __import__("_posixshmem").shm_open("/x", os.O_CREAT | os.O_RDWR, 0o600))
    return done
""",
    "disk": """
def attack(info):
    for folder in (info["folder"], "/tmp", "/var/tmp", "/dev/shm", "/", os.getcwd(), "/run", os.path.dirname(os.__file__)):
        attempt("write " + folder, lambda: open(folder + "/coterie_h", "w"))
        attempt("mkdir " + folder, os.mkdir, folder + "/coterie_h")
        attempt("symlink " + folder, os.symlink, "/", folder + "/coterie_h")
        attempt("fifo " + folder, os.mkfifo, folder + "/coterie_h")
        attempt("tmpfile " + folder, lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR))
    attempt("append", lambda: open(info["secret"], "a"))
    attempt("truncate", os.truncate, info["secret"], 0)
    attempt("truncate by reading", lambda: os.open(info["secret"], os.O_RDONLY | os.O_TRUNC))
    attempt("unlink", os.unlink, info["secret"])
    attempt("rename", os.rename, info["secret"], info["folder"] + "/other")
    attempt("link", os.link, info["secret"], info["folder"] + "/other")
    return done
""",
    "files of others": """
def attack(info):
    attempt("chmod", os.chmod, info["secret"], 0o777)
    attempt("chmod folder", os.chmod, info["folder"], 0o700)
    attempt("chown", os.chown, info["secret"], 1, 1)
    attempt("utime", os.utime, info["secret"], (1, 1))
    attempt("setxattr", os.setxattr, info["secret"], "user.x", b"1")
    attempt("lock", lambda: __import__("fcntl").flock(os.open(os.__file__, os.O_RDONLY), 2))
    return done
""",
    "private files": """
def attack(info):
    pids = ("self", "1", str(info["pid"]), str(os.getppid()))
    paths = [info["secret"], "/etc/shadow", "/etc/passwd", "/etc/hostname", info["package"], "/root/.bashrc", "/dev/mem"]
    paths += ["/proc/%s/%s" % (pid, name) for pid in pids for name in ("environ", "mem", "maps", "cmdline", "root/etc/passwd")]
    for path in paths:
        attempt(path, lambda: open(path, "rb").read(10))
        attempt("O_PATH " + path, lambda: open("/proc/self/fd/%d" % os.open(path, os.O_PATH), "rb").read(10))
    for folder in ("/", "/root", "/home", "/tmp", "/proc", info["folder"]):
        if not (folder == "/" and info["backend"] == "bubblewrap"):
            attempt("list " + folder, os.listdir, folder)
    if info["marker"] in repr(dict(os.environ)):
        done.append("environment")
    return done
""",
    "open descriptors": """
def attack(info):
    for fd in range(3, 256):
        attempt("recv", lambda: socket.socket(fileno=fd).recv(1))
        attempt("read %d" % fd, os.read, fd, 10)
    return done
""",
    "network": """
def attack(info):
    for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, 40):
        for how in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            attempt("socket %d %d" % (kind, how), socket.socket, kind, how)
    attempt("pair", socket.socketpair)
    attempt("loopback", socket.create_connection, ("127.0.0.1", info["port"]), 1)
    attempt("resolve", socket.getaddrinfo, "example.org", 80)
    return done
""",
    "signals": """
def attack(info):
    for pid in (info["pid"], info["victim"], os.getppid(), 1, 0, -1, -info["victim"], -os.getppid()):
        for number_ in (0, signal.SIGSTOP, signal.SIGKILL):
            attempt("kill %d" % pid, os.kill, pid, number_)
    attempt("killpg", os.killpg, info["victim"], 9)
    attempt("pidfd", os.pidfd_open, info["victim"])
    number("tkill", 200, 130, info["victim"], 9)
    number("sigqueue", 129, 138, info["victim"], 9, ctypes.create_string_buffer(128))
    call("fcntl owner", "fcntl", 1, 8, info["victim"])
    return done
""",
    "scheduling": """
def attack(info):
    for pid in (info["pid"], info["victim"], os.getppid()):
        attempt("renice", os.setpriority, os.PRIO_PROCESS, pid, 19)
        attempt("affinity", os.sched_setaffinity, pid, {0})
        attempt("limits", __import__("resource").prlimit, pid, 0, (1, 1))
    attempt("own limits", __import__("resource").setrlimit, 0, (-1, -1))
    attempt("scheduler", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
    return done
""",
    "daemon": """
def attack(info):
    call("pdeathsig", "prctl", 1, 0, 0, 0, 0)
    call("dumpable", "prctl", 4, 1, 0, 0, 0)
    call("daemon", "daemon", 0, 0)
    attempt("setsid", os.setsid)
    attempt("setpgid", os.setpgid, 0, 0)
    attempt("exec", os.execv, "/bin/sh", ["sh", "-c", "sleep 100"])
    return done
""",
    "identity": """
def attack(info):
    for name in ("setuid", "setgid", "seteuid", "setegid"):
        attempt(name, getattr(os, name), 0)
    attempt("setgroups", os.setgroups, [0])
    attempt("chroot", os.chroot, "/")
    attempt("chdir", os.chdir, info["folder"])
    return done
""",
    "dangerous calls": """
def attack(info):
    call("mount", "mount", b"none", b"/tmp", b"tmpfs", 0, None)
    call("umount", "umount2", b"/proc", 2)
    call("unshare", "unshare", 0x10000000)
    call("setns", "setns", 0, 0)
    call("ptrace", "ptrace", 0x4206, info["victim"], 0, 0)
    call("ptrace traceme", "ptrace", 0, 0, 0, 0)
    call("process_vm_readv", "process_vm_readv", info["pid"], None, 0, None, 0, 0)
    call("personality", "personality", 0x0040000)
    call("reboot", "reboot", 0)
    number("bpf", 321, 280, 0, ctypes.create_string_buffer(128), 128)
    number("keyctl", 250, 219, 0, -3, 0)
    number("add_key", 248, 217, b"user", b"x", b"x", 1, -3)
    number("io_uring_setup", 425, 425, 8, ctypes.create_string_buffer(256))
    number("perf_event_open", 298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0)
    number("userfaultfd", 323, 282, 0)
    number("open_by_handle_at", 304, 265, -100, ctypes.create_string_buffer(128), 0)
    number("init_module", 175, 105, None, 0, b"")
    number("kexec_load", 246, 104, 0, 0, None, 0)
    number("kcmp", 312, 272, os.getpid(), info["pid"], 0, 0, 0)
    number("pidfd_getfd", 438, 438, 0, 0, 0)
    number("seccomp", 317, 277, 1, 0, None)
    number("landlock", 444, 444, None, 0, 1)
    number("swapon", 167, 224, b"/x", 0)
    number("settimeofday", 164, 170, None, None)
    number("acct", 163, 89, None)
    number("syslog", 103, 116, 10, None, 0)
    number("openat2", 437, 437, -100, b"/", ctypes.create_string_buffer(24), 24)
    attempt("terminal input", lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"))
    return done
""",
    "memory of the kernel": """
def attack(info):
    import fcntl
    held = 0
    try:
        while True:
            reading, writing = os.pipe()
            attempt("a larger pipe", fcntl.fcntl, writing, 1031, 1 << 20)
            os.set_blocking(writing, False)
            with __import__("contextlib").suppress(BlockingIOError):
                while True: held += os.write(writing, b"x" * 65536)
    except OSError:
        pass
    return done + (["%d MB in pipes" % (held >> 20)] if held > 64 << 20 else [])
""",
    "other processes": """
def attack(info):
    import resource
    for pid in (info["pid"], info["victim"], os.getppid(), 1):
        attempt("affinity %d" % pid, os.sched_getaffinity, pid)
        attempt("limits %d" % pid, resource.prlimit, pid, resource.RLIMIT_NOFILE)
        attempt("group %d" % pid, os.getpgid, pid)
        attempt("session %d" % pid, os.getsid, pid)
        for kind in (0, 1, 2, 4, 5, 6):
            for ask in (time.clock_gettime, time.clock_getres):
                attempt("clock %d" % pid, ask, (~pid << 3) | kind)
            number("sleep by a clock", 230, 115, ctypes.c_int((~pid << 3) | kind), 1, ctypes.create_string_buffer(16), None)
    return done
""",
    "installed packages": """
def attack(info):
    import importlib.metadata, pkgutil
    library = os.path.dirname(os.__file__)
    for folder in (library, library + "/site-packages", library + "/dist-packages", "/usr/lib/python3/dist-packages", *info["packages"]):
        attempt("list " + folder, lambda: 1 / len(os.listdir(folder)))
    attempt("distributions", lambda: 1 / len(list(importlib.metadata.distributions(path=info["packages"]))))
    attempt("modules", lambda: 1 / len(list(pkgutil.iter_modules(info["packages"]))))
    return done
""",
    "other dangerous calls": """
def attack(info):
    number("timer_create", 222, 107, 0, None, ctypes.byref(ctypes.c_int()))
    number("inotify", 294, 26, 0)
    number("mq_open", 240, 180, b"x", 0o102, 0o600, None)
    number("semget", 64, 190, 0, 10, 0o1666)
    number("msgget", 68, 186, 0, 0o1666)
    number("memfd_secret", 447, 447, 0)
    number("splice", 275, 76, 0, None, 1, None, 1, 0)
    number("sendfile", 40, 71, 1, 0, None, 1)
    number("fallocate", 285, 47, 1, 0, 0, 1 << 30)
    number("mlockall", 151, 230, 3)
    number("process_vm_writev", 311, 271, info["pid"], None, 0, None, 0, 0)
    number("fsopen", 430, 430, b"tmpfs", 0)
    number("clock_settime", 227, 112, 0, None)
    number("sethostname", 170, 161, b"x", 1)
    number("sync", 162, 81)
    number("execveat", 322, 281, -100, b"/bin/sh", None, None, 0)
    return done
""",
}
# Programs that have to be ended: which error their output has
ENDED = {
    "endless loop": ("def attack(info):\n    while True: pass", "took longer"),
    "endless import": ("while True: pass", "took longer"),
    "sleeping": ("import time\ndef attack(info):\n    time.sleep(1000)", "took longer"),
    "ignores signals": (
        "import signal\ndef attack(info):\n    for n in range(1, 65):\n        try: signal.signal(n, signal.SIG_IGN)\n"
        "        except (OSError, ValueError): pass\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
        "took longer",
    ),
    "stops itself": ("import os, signal\ndef attack(info):\n    os.kill(os.getpid(), signal.SIGSTOP)", "took longer"),
    "a gigabyte returned": ("def attack(info):\n    return 'x' * (1 << 28)", ""),
    "a gigabyte on every descriptor": (
        "import os\ndef attack(info):\n    block = b'x' * (1 << 20)\n    for _ in range(1 << 10):\n        for fd in range(64):\n"
        "            try: os.write(fd, block)\n            except OSError: pass",
        "wrote more",
    ),
    "many small records": (
        "import gc\ndef attack(info):\n    c = [o for o in gc.get_objects() if type(o).__name__ == 'Channel'][0]\n"
        "    while True: c.say(test=0, value=[[]] * 1000)",
        "",
    ),
    "deep": ("def attack(info):\n    x = []\n    for _ in range(100000): x = [x]\n    return x", "nested"),
    "crash": ("import ctypes\ndef attack(info):\n    ctypes.string_at(0)", "crashed"),
    "closes everything": ("import os\ndef attack(info):\n    os.closerange(0, 256)\n    while True: pass", "killed"),
    "system calls of i386": (  # fork() by a number that is another's on x86_64
        "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\ncode.write(bytes.fromhex('b802000000cd80c3'))\n"
        "def attack(info):\n    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()",
        "SIGSYS" if platform.machine() == "x86_64" else "crashed",
    ),
    "syntax bomb": ("(" * 100000, ""),
    "exponent": ("def attack(info):\n    return 9 ** 9 ** 9", ""),
    "digits": ("def attack(info):\n    return 10 ** 100000", ""),
}
PRINTED = "import sys\nblock = 'x' * (1 << 20)\nfor _ in range(1 << 10): sys.stdout.write(block)"


def memory_peak():
    """Megabytes that this process has held at most."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1000


def descendants(pid):
    """Process ids of all that descend from pid, and of servers and programs of this process that have another parent now."""
    parents, found = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if f'"parent": {pid}'.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    more = {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found - {pid}


class World:
    """What a program must not touch."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="coterie-hostile-")
        os.chmod(self.folder, 0o777)
        self.secret = Path(self.folder) / "secret"
        self.secret.write_text(SECRET)
        self.victim = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.reached = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(f"{self.folder}/socket")
        self.local.listen()
        for server in (self.tcp, self.local):
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        os.environ["COTERIE_MARKER"] = SECRET

    def _accept(self, server):
        with contextlib.suppress(OSError):
            while server.accept():
                self.reached += 1

    def info(self, backend):
        return {
            "pid": os.getpid(), "victim": self.victim.pid, "folder": self.folder, "secret": str(self.secret),
            "port": self.tcp.getsockname()[1], "marker": SECRET, "backend": backend, "package": __import__("coterie").__file__,
            "packages": [path for path in sys.path if path.endswith("-packages")],
        }  # fmt: skip

    def harm(self):
        """What is not as it was."""
        status = self.secret.stat()
        facts = {
            "the secret": self.secret.read_text() == SECRET and status.st_mode & 0o777 == self.mode and status.st_uid == os.getuid(),
            "the folder": sorted(os.listdir(self.folder)) == ["secret", "socket"],
            "the victim": self.victim.poll() is None and os.getpriority(os.PRIO_PROCESS, self.victim.pid) == self.nice,
            "the sockets": self.reached == 0,
            "files elsewhere": not any(os.path.exists(f"{f}/coterie_h") for f in ("/tmp", "/var/tmp", "/dev/shm", "/", "/run")),
        }  # fmt: skip
        return [what for what, unharmed in facts.items() if not unharmed]

    def __enter__(self):
        self.mode = self.secret.stat().st_mode & 0o777
        self.nice = os.getpriority(os.PRIO_PROCESS, self.victim.pid)
        return self

    def __exit__(self, *_):
        self.victim.kill()
        self.victim.wait()
        for path in (self.secret, Path(self.folder) / "socket"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)


def main(backend):
    through = {}
    limits = Limits(seconds=20, memory_megabytes=256)
    short = Limits(seconds=5, wall_seconds=0.7, memory_megabytes=256, output_bytes=1_000_000)
    with World() as world:
        try:
            sandbox = make_sandbox(backend, num_workers=2)
        except UserError as error:
            print(json.dumps({"refused": str(error)}))
            return
        servers = descendants(os.getpid())
        before = memory_peak()
        programs = [Program(HEAD + source, [[world.info(backend)]], "attack", limits) for source in PROGRAMS.values()]
        for (name, _), outcome in zip(PROGRAMS.items(), sandbox.run_all(programs), strict=True):
            got = outcome.failed or outcome.outputs[0].error or outcome.outputs[0].value
            if got:
                through[name] = got
        programs = [Program(source, [[{}]], "attack", short) for source, _ in ENDED.values()]
        start = time.monotonic()
        for (name, (_, error)), outcome in zip(ENDED.items(), sandbox.run_all(programs), strict=True):
            said = outcome.failed or outcome.outputs[0].error
            if outcome.failed or (error and error not in (said or "")):
                through[name] = f"ended with {said!r}"
        if time.monotonic() - start > 0.7 * len(ENDED) + 20:
            through["time"] = time.monotonic() - start
        (printed,) = sandbox.run(Program(PRINTED, [""], None, limits)).outputs
        if "wrote more" not in (printed.error or ""):
            through["a gigabyte printed"] = printed.error
        growth = memory_peak() - before
        if growth > 100:
            through["memory of the trainer"] = growth
        held = sandbox.run(Program("def f(): return 1", [[]], "f", limits)).outputs
        if held[0].value != 1:
            through["afterwards"] = repr(held)
        left = descendants(os.getpid()) - servers - {world.victim.pid}
        # a second worker has been started: its server, and bubblewrap's own two processes
        if len(left) > (3 if backend == "bubblewrap" else 1):
            through["survivors"] = sorted(left)
        if world.harm():
            through["harm"] = world.harm()
        sandbox.close()
        time.sleep(0.2)
        if descendants(os.getpid()) - {world.victim.pid}:
            through["left behind"] = sorted(descendants(os.getpid()) - {world.victim.pid})
    found = {"through": through, "programs": len(PROGRAMS) + len(ENDED) + 1, "growth_megabytes": growth}
    print(json.dumps({**found, "report": sandbox.report}))


def attacked(backend, as_nobody):
    """What `main` prints, run by this user or by one without rights; {"refused": why} where that can't be."""
    who, python = {}, sys.executable
    if as_nobody:
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        python = None if os.getuid() else python_for_everyone(who)
        if python is None:
            return {"refused": "this user is no root, or a plain user can't start Python 3.11 or read this checkout"}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, __file__, backend], capture_output=True, text=True, timeout=200, cwd="/", env=environment, **who
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def python_for_everyone(who):
    """An interpreter that a plain user can start, which this one may not be."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        check = f"import sys; assert sys.version_info >= (3, 11); open({coterie.__file__!r})"
        with contextlib.suppress(OSError):
            if not subprocess.run([path, "-c", check], capture_output=True, cwd="/", **who).returncode:
                return path
    return None


if __name__ == "__main__":
    main(sys.argv[1])
