"""Inside the sandbox: give up every right, then run one program. Started by `tasks.sandbox`; imports nothing of this package.

    stdin  <- {"source", "function", "calls": [[argument, ...], ...], "home", "parent", limits}
    stdout -> {"ready": true} or {"refused": "why"}, before any of the program runs
           -> {"value": result} or {"error": "TypeError"} for each call, in order

Nothing in this process knows what the results should be: they are compared outside, so whatever the program does to it (patch
modules, write here itself, exit early) can only change which results it claims to have.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from typing import Any

NOBODY = 65534

# Of linux/prctl.h, linux/sched.h, linux/mount.h, linux/landlock.h; the three system calls have one number everywhere.
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
READ = 1 << 2 | 1 << 3  # files, directories
WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # files; remove directories, files; make directories, files
EVERYTHING = (1 << 13) - 1  # the file rights that every version of Landlock knows
TRUNCATE, TRUNCATE_SINCE = 1 << 14, 3
CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION = 0x20080522

# What a single-threaded program of the standard library needs. Not here, so refused: processes and threads (clone, execve),
# signals, sockets, ptrace, mounts, namespaces, shared memory, changing modes, owners, links and limits.
ALLOWED = [
    "read",
    "readv",
    "write",
    "writev",
    "pread64",
    "pwrite64",
    "lseek",
    "open",
    "openat",
    "close",
    "fstat",
    "newfstatat",
    "stat",
    "lstat",
    "statx",
    "fstatfs",
    "statfs",
    "access",
    "faccessat",
    "faccessat2",
    "readlink",
    "readlinkat",
    "getcwd",
    "chdir",
    "getdents64",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "ftruncate",
    "fsync",
    "fdatasync",
    "flock",
    "dup",
    "dup2",
    "dup3",
    "fcntl",
    "ioctl",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "select",
    "pselect6",
    "umask",
    "mmap",
    "munmap",
    "mprotect",
    "mremap",
    "madvise",
    "brk",
    "futex",
    "sched_yield",
    "sched_getaffinity",
    "rseq",
    "set_robust_list",
    "membarrier",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "restart_syscall",
    "getpid",
    "getppid",
    "gettid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getrusage",
    "times",
    "uname",
    "sysinfo",
    "clock_gettime",
    "clock_getres",
    "clock_nanosleep",
    "nanosleep",
    "gettimeofday",
    "time",
    "getrandom",
    "exit",
    "exit_group",
]

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A restriction that could not be put in place; the message says what it needs."""


class _AddRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def call(what: str, name: str, *arguments: Any) -> int:
    """A function of libc, or "syscall". Raises Refused, with `what` it is for, when it fails."""
    result = getattr(libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def leave(home: str, file_mb: int) -> None:
    """Namespaces of its own: no network, no shared memory of others, every mount read-only but a small tmpfs at `home`."""
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | (CLONE_NEWUSER if user else 0)
    what = "unshare (namespaces are not allowed here; reward option namespaces: false does without)"
    call(what, "unshare", flags)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    call(what, "mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    call("mount_setattr", "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, 32)
    size = f"size={file_mb}m,nr_inodes=1024,mode=1777".encode()
    call(what, "mount", b"tmpfs", home.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    os.chdir(home)


def limit(cpu_seconds: int, memory_mb: int, file_mb: int) -> None:
    """Limits that the program cannot raise; the CPU's is fatal at once."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def drop() -> None:
    """No capability is left; root becomes nobody, but may read what only root may: Landlock says which files those are."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of capabilities 0 to 31, then of the rest
    call("capget", "capget", header, sets)
    keep = sets[1] & 1 << CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    if os.geteuid() == 0:
        call("prctl", "prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", "capset", header, (ctypes.c_uint32 * 6)(keep, keep))


def rules(readable: Iterable[str], writable: str | None) -> int:
    """A Landlock ruleset: only these files and what is beneath them can be opened. Without `writable`, none for writing."""
    what = "Landlock (Linux 5.13 or later, with it switched on)"
    version = call(what, "syscall", SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    truncate = TRUNCATE if version >= TRUNCATE_SINCE else 0
    if writable is None and not truncate:  # no read-only mounts either: opening to read could still empty a file
        raise Refused("Landlock of Linux 6.2 or later, which reward option namespaces: false needs")
    attributes = ctypes.c_uint64(EVERYTHING | truncate)
    ruleset = call(what, "syscall", SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), 8, 0)
    wanted = [(path, READ if os.path.isdir(path) else READ & ~(1 << 3)) for path in readable if os.path.exists(path)]
    if writable is not None:
        wanted.append((writable, READ | WRITE | truncate))
    for path, rights in wanted:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.byref(_AddRule(rights, place))
        call(what, "syscall", SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, rule, 0)
        os.close(place)
    return ruleset


def load_filter() -> None:
    """System calls not in `ALLOWED` fail with EPERM from now on (libseccomp knows their numbers on every machine)."""
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise Refused("libseccomp.so.2 (apt-get install libseccomp2)") from None
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(0x00050000 | 1))  # SCMP_ACT_ERRNO(EPERM)
    for name in ALLOWED:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number != -1:  # of a newer library
            seccomp.seccomp_rule_add(context, ctypes.c_uint32(0x7FFF0000), number, 0)  # SCMP_ACT_ALLOW
    if seccomp.seccomp_load(context) != 0:
        raise Refused("seccomp, which this kernel or container does not allow")


def confine(request: dict[str, Any]) -> None:
    """Every restriction, or Refused."""
    home, libraries = request["home"], sys.base_prefix + "/lib"
    readable = (libraries, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
    if request["namespaces"]:
        leave(home, request["file_mb"])
    ruleset = rules(readable, home if request["namespaces"] else None)
    limit(request["cpu_seconds"], request["memory_mb"], request["file_mb"])
    drop()
    call("prctl", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("Landlock", "syscall", SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    call("prctl", "prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != request["parent"]:  # it died before it could take this process with it
        os._exit(1)
    load_filter()


def main() -> None:
    request = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "r+") as nothing:
        for standard in (0, 1, 2):
            os.dup2(nothing.fileno(), standard)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        confine(request)
    except (Refused, OSError, ValueError) as error:
        say({"refused": str(error)})
        return
    say({"ready": True})
    scope: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(request["source"], "solution.py", "exec"), scope)
        function = scope[request["function"]]
    except BaseException as error:
        for _ in request["calls"]:
            say({"error": type(error).__name__})
        os._exit(0)
    for arguments in request["calls"]:
        try:
            say({"value": function(*arguments)})
        except BaseException as error:  # SystemExit too; also of a result that JSON cannot say
            say({"error": type(error).__name__})
    os._exit(0)


if __name__ == "__main__":
    main()
