"""How a process hands out memory: what an update frees is kept, unless blocks are gathered."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import re, sys
from pathlib import Path
from ringmoe_cli.machine import keep_memory_of_updates

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

keep_memory_of_updates(gathered=sys.argv[1] == "gathered")
import torch
before = resident()
buffer, later = torch.ones(16 << 20), torch.ones(1)
full = resident()
del buffer
print(before, full, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be steered")
@pytest.mark.parametrize("layout", ["gathered", "whole"])
def test_large_buffers_go_back_only_beside_gathered_blocks(layout: str) -> None:
    words = [sys.executable, "-c", PROBE, layout]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, full, after = map(int, done.stdout.split())
    assert full - before > 60  # a buffer of 64 MB
    assert (after < full - 60) == (layout == "gathered")
