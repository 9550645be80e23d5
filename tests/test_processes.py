"""Memory that a process keeps, seen in what the system counts: the pages that it had to hand out."""

import os
import resource
import subprocess
import sys

import pytest

COUNTED = """
import contextlib, resource, sys, tempfile
from pathlib import Path
import torch
from cadetlib import pretrain, processes, record, score

BEGIN

def allocate():  # 64 MiB, more than glibc ever serves from its own heap by itself
    torch.ones(2**24)

for _ in range(2):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 8 * 2**26 // resource.getpagesize()


def pages(begin):
    """How many pages the system hands out for 64 MiB that are allocated and freed eight times, after `begin`."""
    told_nothing = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNTED.replace("BEGIN", begin)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=told_nothing).stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told")
@pytest.mark.parametrize(
    "begin",
    [
        "processes.keep_freed_memory()",
        'record.start("08_report", {"output": tempfile.mkdtemp()})',
        'score.main(["score", "--detector", "none.safetensors", "--images", "none", "--out", "none.csv"])',
        'with contextlib.suppress(OSError): pretrain.main(["--params", "no-such-file.yaml"])',
    ],
    ids=["asked", "notebook", "scoring", "pretraining"],
)
def test_memory_that_is_freed_serves_again(begin):
    assert pages(begin) <= PAGES / 4  # what lies in between may make an allocation or two of the eight find another place


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told")
def test_the_library_alone_leaves_its_users_process_as_it_is():
    assert pages("") > PAGES / 2
