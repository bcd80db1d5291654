"""Python programs as real processes, without the five seconds in which each imports torch.

Popen and run are those of subprocess. A command `[sys.executable, ...]` becomes a fork of a server:
a process that has imported torch, nothing of this project, and waits. Such a fork is a child of
whoever began it, with a pid, signals, pipes, a folder and an environment of its own, and it ends as
an interpreter ends, up to where modules are torn down, which takes torch 0.4 s. The ranks of a
torchrun that begins so are forks too, and children of that torchrun. What a program could see of
it: modules that nobody imported, the memory that they take, limits and flags of the server. Where
one of these, or the start itself, is the point of a test, it uses subprocess. Where no such fork
can be (outside Linux, or with options that are not known here) a new interpreter starts."""

import atexit
import ctypes
import functools
import gc
import importlib
import inspect
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: orphans below this process become its children
# Variables that Python and torch's libraries read when they start: a server for each setting.
READ_AT_START = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "CUDA_", "PYTORCH_", "TORCH_LOGS")
READ_AT_START += ("PYTHON", "LD_", "MALLOC_", "LC_", "LANG")
READ_BY_ADAPTERS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "HOME", "XDG_")
READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
# What pretrain (on a busy machine) and libraries set when a test imports them; a program that
# imports them sets it itself.
SET_BY_IMPORTS = ("KMP_DUPLICATE_LIB_OK", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTHONBREAKPOINT")
SET_BY_IMPORTS += ("HF_XET_HIGH_PERFORMANCE", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
UNUSED = {  # options of Popen that a fork does not know, and their values when nobody gives them
    **{"preexec_fn": None, "pass_fds": (), "executable": None, "shell": False, "close_fds": True},
    **{"startupinfo": None, "creationflags": 0, "restore_signals": True, "process_group": -1},
    **{"gid": None, "gids": None, "uid": None, "umask": -1},
}
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
LAUNCHER = ["-m", "torch.distributed.run"]
_servers: dict[tuple, socket.socket] = {}  # by what of the environment is read at start
_processes: list[subprocess.Popen] = []
_asking = threading.Lock()


# ---- who begins a process


class Popen(subprocess.Popen):
    """subprocess.Popen, of a fork where that can be."""

    imports = (  # by the server: what the first optimizer of a process needs, and most others
        *("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.run"),
        *("tabulate", "filelock", "pyarrow", "tiktoken", "yaml"),
    )

    def _execute_child(self, *arguments, **named):
        start = super()._execute_child
        options = inspect.signature(start).bind(*arguments, **named).arguments
        words = options["args"]
        known = all(options.get(name, value) == value for name, value in UNUSED.items())
        if sys.platform != "linux" or not known or not is_forkable(words):
            return start(*arguments, **named)
        environment = dict(os.environ if options["env"] is None else options["env"])
        ends = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = ask(
            self.imports,
            words=[os.fspath(word) for word in words[1:]],
            folder=os.path.abspath(options["cwd"] or "."),
            environment={
                os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()
            },
            session=options["start_new_session"],
            files=[number if end == -1 else end for number, end in enumerate(ends)],
        )
        self._child_created = True
        self._close_pipe_fds(*(options[name] for name in PIPES))
        return None


class AdapterPopen(Popen):
    """For programs of adapters/: their frameworks take ten seconds more."""

    imports = (
        *(*Popen.imports, "accelerate", "lightning.pytorch", "transformers.trainer"),
        *("transformers.models.gpt2.modeling_gpt2", "transformers.models.gpt2.tokenization_gpt2"),
    )


def run(*arguments, popen=Popen, check=False, **named):
    """subprocess.run, of a fork where that can be."""
    before, subprocess.Popen = subprocess.Popen, popen
    try:
        return subprocess.run(*arguments, check=check, **named)
    finally:
        subprocess.Popen = before


def prepared(code, words):
    """The command that runs a script as `python WORDS` does, after some code in its process."""
    run_it = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", f"{code}\n{run_it}", *map(str, words)]


def closed(*numbers):
    """Code for prepared: what Python finds where standard descriptors are closed (`>&-`)."""
    names = [("stdin", "stdout", "stderr")[number] for number in numbers]
    return "import os, sys\n" + "\n".join(
        f"os.close({number})\nsys.{name} = sys.__{name}__ = None"
        for number, name in zip(numbers, names, strict=True)
    )


def is_forkable(words):
    """Whether this is a command of this Python: a script, -c or -m, with at most -u before it."""
    if isinstance(words, (str, bytes, os.PathLike)) or words[0] != sys.executable:
        return False
    words = [os.fspath(word) for word in words[1:]]
    words = words[1:] if words[:1] == ["-u"] else words
    return len(words) > 0 and (words[0] in ("-c", "-m") or not words[0].startswith("-"))


def ask(imports, *, environment, files, **about):
    """The pid of a new child of this process, forked by the server of this environment."""
    with _asking:
        return request(environment, imports, files, about | {"environment": environment})


def request(environment, imports, files, about):
    channel = server(environment, imports)
    answer = b""
    adopt(True)
    try:
        socket.send_fds(channel, [json.dumps(about).encode()], files)
        answer = channel.recv(100)
    finally:
        adopt(False)
        if not answer:  # a test's time was over: the next is not to get this answer
            channel.close()
            del _servers[read_at_start(environment, imports)]
    if not answer:
        raise RuntimeError("the server of forks is gone")
    return int(answer)


def adopt(whether):
    """Whether orphans of this process's children become its own children."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def read_at_start(environment, imports):
    """What tells servers apart."""
    prefixes = READ_AT_START if imports == Popen.imports else (*READ_AT_START, *READ_BY_ADAPTERS)
    apart = (*READ_LATER, *SET_BY_IMPORTS)
    names = [name for name in environment if name.startswith(prefixes) and name not in apart]
    return imports, *((name, environment[name]) for name in sorted(names))


def server(environment, imports):
    """The channel to the server of this environment, which is begun where there is none: as a new
    process, or as a fork of the one that has imported half of what it needs."""
    key = read_at_start(environment, imports)
    if key not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {name: value for name, value in environment.items() if name not in READ_LATER}
        with theirs:
            if imports != Popen.imports and imports[: len(Popen.imports)] == Popen.imports:
                about = {"imports": imports[len(Popen.imports) :], "environment": kept}
                request(environment, Popen.imports, [theirs.fileno()], about)
            else:
                begin_server(theirs, imports, kept)
        _servers[key] = ours  # the server ends when this process does, however that is
    return _servers[key]


def begin_server(channel, imports, environment):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forked"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; forked.serve_and_run({channel.fileno()}, {imports})"],
        env=environment,
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _processes.append(process)  # it is not waited for, and Python need not warn


# ---- the server and its forks


def serve_and_run(number, imports):
    """The life of a server, and in each of its forks the program that was asked for."""
    for name in imports:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # torch takes apart what it registered, in every fork
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path(__file__).parent))]
    about = serve(socket.socket(fileno=number))
    if "imports" in about:  # it is to be a server itself
        os.environ.clear()
        os.environ.update(about["environment"])
        serve_and_run(*about["files"], about["imports"])
    become(about)
    if about["words"][: len(LAUNCHER)] == LAUNCHER:
        serve_below()
    execute_and_end(about["words"])


def serve(channel):
    """Fork for each message; returns in the forks alone, with what was asked for."""
    while True:
        message, files, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            os._exit(0)
        reader, writer = os.pipe()
        if (between := os.fork()) == 0:
            between = os.getpid()
            if pid := os.fork():
                os.write(writer, str(pid).encode())
                os._exit(0)  # its child is adopted by the process that asked
            while os.getppid() == between:
                time.sleep(0.0005)
            for descriptor in (reader, writer):
                os.close(descriptor)
            channel.close()
            return json.loads(message) | {"files": files}
        os.close(writer)
        pid = os.read(reader, 100)
        os.waitpid(between, 0)
        for descriptor in (reader, *files):
            os.close(descriptor)
        channel.send(pid)


def become(about):
    """What a child has of its own when Python starts."""
    if about["session"]:
        os.setsid()
    os.chdir(about["folder"])
    os.environ.clear()
    os.environ.update(about["environment"])
    for number, descriptor in enumerate(about["files"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    words = about["words"]
    unbuffered = words[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    if words[0] == "-u":
        del words[0]
    stdin = io.BufferedReader(io.FileIO(0, "r", closefd=False))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(stdin, encoding=sys.stdin.encoding)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            file if unbuffered else io.BufferedWriter(file),
            encoding=getattr(sys, name).encoding,
            errors=getattr(sys, name).errors,
            line_buffering=number == 2 or file.isatty(),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _servers.clear()


def serve_below():
    """A server of its own for this process, a torchrun, which begins its ranks with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        about = serve(theirs)
        become(about)
        execute_and_end(about["words"])
    theirs.close()
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    importlib.import_module(handler).Popen = Popen
    # It asks for the names of its callers again and again: without lines of their source, which
    # would be looked for among two thousand modules, most of its time.
    inspect.stack = functools.partial(inspect.stack, 0)
    _servers[read_at_start(os.environ, Popen.imports)] = ours


def execute_and_end(words):
    """Run a program, then do what Python does at its end, up to where modules are torn down."""
    try:
        execute(words)
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        sys.exit(status)  # the interpreter has its own way with this
    os._exit(status & 0xFF)


def execute(words):
    """Run a program as `python WORDS` does; what it raises ends this process as it ends Python."""
    main = sys.modules["__main__"]
    for name in [name for name in vars(main) if not name.startswith("__")]:
        delattr(main, name)
    first = {"-c": "", "-m": os.getcwd()}.get(words[0])
    script = first is None
    if script:
        first = str(Path(words[0]).resolve().parent)
    below = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [first, *(entry for entry in below if entry)]
    importlib.invalidate_caches()
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = words if script else ["-c", *words[2:]]
    if script:
        main.__file__ = words[0]
    source = Path(words[0]).read_bytes() if script else words[1]
    exec(compile(source, words[0] if script else "<string>", "exec"), vars(main))
