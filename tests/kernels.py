"""Kernels in a second: a server imports what a driver needs, once, and forks a process for each notebook that is run.

`start(folder)` gives the JUPYTER_PATH under which `python3` means such a kernel. What Jupyter starts there is this file: it asks
the server for a kernel, passes signals on, and ends as the kernel ends; a kernel ends, too, when what asked for it is gone."""
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path


def serve(path: str) -> None:
    import pkgutil
    from importlib import import_module
    import embedlab
    import ipykernel.kernelapp
    for m in pkgutil.iter_modules(embedlab.__path__): import_module(f"embedlab.{m.name}")
    threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")[1:]]
    assert {*threads} <= {"jemalloc_bg_thd"}, f"a process with threads can't be forked safely: {threads}"   # pyarrow's allocator looks after its own
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path + ".part"); listening.listen(); os.rename(path + ".part", path)   # there when it can be asked
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([listening], [], [], 1.0)[0]: continue
        asked, _ = listening.accept()
        if not os.fork():
            listening.close()
            watch(asked)
        asked.close()


def watch(asked: socket.socket) -> None:
    "Fork a kernel, and tell how it ended; end it when nobody waits for it any more."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(asked, 1 << 20, 2)
    how = json.loads(message)
    if not (kernel := os.fork()): run(how, files)   # does not return
    for f in files: os.close(f)
    asked.send(f"{kernel}\n".encode())
    while True:
        gone, status = os.waitpid(kernel, os.WNOHANG)
        if gone: break
        if select.select([asked], [], [], 0.05)[0] and not asked.recv(1): os.kill(kernel, signal.SIGKILL)
    try: asked.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    except BrokenPipeError: os._exit(0)   # it was killed because nobody waits
    os._exit(0)


def run(how: dict, files: list[int]) -> None:
    code = 1
    try:
        os.dup2(files[0], 1); os.dup2(files[1], 2)
        os.environ.clear(); os.environ.update({k: v for k, v in how["env"].items() if k != "JPY_PARENT_PID"})   # its parent is not who waits for it
        os.chdir(how["cwd"])
        sys.argv, sys.path = ["ipykernel_launcher", "-f", *how["args"], "--matplotlib=inline"], ["", *sys.path]   # as when pyplot is first imported in a kernel
        from ipykernel.kernelapp import launch_new_instance
        launch_new_instance()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    finally: os._exit(code)


def ask(path: str, *args: str) -> int:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        socket.send_fds(s, [json.dumps({"env": dict(os.environ), "cwd": os.getcwd(), "args": args}).encode()], [1, 2])
        said = s.makefile()
        kernel, parent = int(said.readline()), os.getppid()
        for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, _: os.kill(kernel, n))
        while not select.select([s], [], [], 0.5)[0]:
            if os.getppid() != parent: return 1   # what runs the notebook is gone
        code = said.readline()
        if int(code or 1) < 0: signal.signal(-int(code), signal.SIG_DFL) if -int(code) != signal.SIGKILL else None; os.kill(os.getpid(), -int(code))
        return int(code or 1)


def start(folder) -> str:
    "Start a server that ends with this process."
    import subprocess
    path = folder / "ask"   # short: the name of a socket has 107 letters at most
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": [sys.executable, "-S", __file__, "ask", str(path), "{connection_file}"], "display_name": "Python 3, forked", "language": "python"}))
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}   # no threads, which a fork would lose; offline is settled on import
    p = subprocess.Popen([sys.executable, __file__, "serve", str(path)], env=os.environ | alone)
    while not path.exists():
        assert p.poll() is None, "no server for kernels"
        time.sleep(0.02)
    return str(folder / "jupyter")


if __name__ == "__main__":
    if sys.argv[1] == "serve": serve(sys.argv[2])
    else: sys.exit(ask(*sys.argv[2:]))
