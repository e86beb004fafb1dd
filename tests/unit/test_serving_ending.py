"""A program that ends while connected, and while serving, ends cleanly: no thread is torn out of a kernel."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import atexit, socket, sys, threading, time

def left():
    return [t.name for t in threading.enumerate() if t is not threading.main_thread()]

def look():  # exit functions run in reverse: this one comes after splitveil's
    patience = time.monotonic() + 5
    while left() and time.monotonic() < patience:
        time.sleep(0.01)
    print("left:", left(), flush=True)

atexit.register(look)

import torch
from splitveil.serving.connect import connect
from splitveil.serving.server import Server
from test_serving_release import Small, served

server = Server({"a": served()}, "127.0.0.1:0", metrics="127.0.0.1:0")
host, _, port = server.metrics_address.rpartition(":")
silent = socket.create_connection((host, int(port)))
model = connect(Small().eval(), server.address, "a", pool_bytes=256 << 20)
model(torch.ones(1, 16))
model(torch.ones(1, 16))
print("busy:", "splitveil-masks" in left(), "splitveil-answers" in left(), "splitveil-session" in left(),
      "splitveil-metrics" in left(), flush=True)
sys.exit(ENDING)
"""


def test_a_program_that_ends_while_connected_leaves_no_thread_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ENDING", "0")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert done.stdout == "busy: True True True True\nleft: []\n", done.stdout + done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


def test_so_does_one_that_ends_with_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ENDING", "'broken'")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.endswith("left: []\n"), done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (1, "broken\n")
