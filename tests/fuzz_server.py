"""Runs command lines of the scripts in forked children, for test_fuzz.py.

Importing torch takes seconds, a fork milliseconds.

    python tests/fuzz_server.py ROOT          a line of JSON in, a line of JSON out, until the end of stdin

in:  {"script": "sample.py", "argv": [...], "folder": where to run it, "cpu": seconds until it is cut off}
out: {"end": see `run_child`, "code": exit code or sentence, "err": the end of stderr, "seconds": of the CPU}
"""
import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

MEMORY = 2 << 30               # bytes that a child may allocate beyond the server's; more is an error
HANGS = 90                     # seconds of wall time, after which a child counts as hanging

# Includes what the scripts import while they run. None of it computes anything with torch, which would start
# threads that a fork loses.
IMPORTS = ("train_vae", "finetune", "sample", "evaluate", "lpips", "matplotlib.pyplot", "torch._dynamo",
           "torch_fidelity.metric_kid", "torch.distributed.tensor")


class Cut(BaseException):
    """Raised in a child whose time is up."""


def cut(number, frame):
    raise Cut


def no_network(*args):
    raise OSError("no test uses the network")


def run_child(request, files):
    """Run a script as __main__ in this process.  Returns (end, code).

    end: "exit": the script ended by itself or by SystemExit; "traceback": by another exception; "cut": by the
    time limit. files: where stdout and stderr go.
    """
    for stream, number in zip(files, (1, 2)):
        os.dup2(stream.fileno(), number)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    socket.socket.connect = no_network
    sys.modules["evaluate"].report_at_the_end = lambda job, text: None         # it would use up the time
    signal.signal(signal.SIGPROF, cut)
    signal.setitimer(signal.ITIMER_PROF, request["cpu"])
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["argv"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
        return "exit", 0
    except SystemExit as stop:
        return "exit", stop.code or 0
    except Cut:
        return "cut", 0
    except BaseException:
        traceback.print_exc()
        return "traceback", 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()


def answer(request):
    """Fork a child for a request, wait for it, kill it if it hangs."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as result:
        child = os.fork()
        if child == 0:
            end = run_child(request, (out, err))
            os.write(result.fileno(), json.dumps(end).encode())
            os._exit(0)
        start = time.time()
        ended, _, usage = os.wait4(child, os.WNOHANG)
        while not ended and time.time() - start < HANGS:
            time.sleep(0.005)
            ended, _, usage = os.wait4(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
        result.seek(0)
        end, code = json.loads(result.read() or '["killed", 1]')
        err.seek(max(0, err.seek(0, os.SEEK_END) - 4000))
        text = err.read().decode(errors="replace")
    return {"end": end, "code": code, "err": text, "seconds": usage.ru_utime + usage.ru_stime}


def main():
    sys.path.insert(0, sys.argv[1])
    sys.path.insert(0, str(Path(sys.argv[1]) / "tests"))
    importlib.import_module("support.metrics").import_torchvision()
    for name in IMPORTS:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        request["script"] = str(Path(sys.argv[1]) / request["script"])
        print(json.dumps(answer(request)), flush=True)


if __name__ == "__main__":
    main()
