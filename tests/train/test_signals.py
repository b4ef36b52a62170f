"""The first SIGTERM is a request, the second an order."""

import pathlib
import signal
import subprocess
import sys
import threading

from sparse_attn.train import signals

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = """
import time
from sparse_attn.train import signals

with signals.StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    try:
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""


def test_a_second_sigterm_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "requested\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 128 + signal.SIGTERM


def test_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with signals.StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
