"""Memory that one step frees is there for the next, without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

CODE = """
import ctypes, resource, sys, torch
from sra2_fast.train.allocator import keep_freed_memory

def faults_of_ten_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        activations = [torch.ones(2 << 20) for _ in range(6)]  # 8 MiB each
        del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if not keep_freed_memory():
    sys.exit(77)
ctypes.CDLL(None).mallopt(-3, 128 << 10)  # where every process starts: large blocks go back at once
before = faults_of_ten_steps()
keep_freed_memory()
faults_of_ten_steps()
print(before, faults_of_ten_steps())
"""


def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 77:
        pytest.skip("not the GNU C library")
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 10_000 and after < before / 20
