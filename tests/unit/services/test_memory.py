import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_BLOCK_MADE_TWICE = """
import resource, sys
from services.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del_me = bytearray(8 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del del_me
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS_OF_A_BLOCK_MADE_TWICE, how]))
        for how in ("keep", "default")
    }
    assert faults["default"] > 1000  # 2048 pages
    assert faults["keep"] < 100
