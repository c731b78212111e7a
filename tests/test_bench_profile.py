"""What perf says of the daemon, by thread and part."""

import subprocess
import sys

from test_bench import PROJECT

from bench.profile import part, samples, summed

SCRIPT = """
  101
\tffffffff81a0 ext4_sync_file+0x1 ([kernel.kallsyms])
\tffffffff81b0 __x64_sys_fdatasync+0x2 ([kernel.kallsyms])
\tffffffff81c0 do_syscall_64+0x3 ([kernel.kallsyms])
\t    7f01 fdatasync+0x4 (/usr/lib/x86_64-linux-gnu/libc.so.6)

  100
\t    7f02 _PyEval_EvalFrameDefault+0x5 (/usr/bin/python3.11)

  100
\t    7f03 mpack (decode) [inlined] (/venv/lib/python3.11/site-packages/msgspec/_core.cpython-311-x86_64-linux-gnu.so)
\t    7f02 _PyEval_EvalFrameDefault+0x5 (/usr/bin/python3.11)

  100
\tffffffff81d0 tcp_recvmsg+0x6 ([kernel.kallsyms])
\tffffffff81e0 ksys_read+0x7 ([kernel.kallsyms])
""".splitlines()


def test_a_sample_is_counted_by_its_thread_and_by_what_it_was_for():
    """The kernel's share goes to the system call that was asked for, the rest to the library that ran."""
    count, parts, symbols = summed(SCRIPT, main_thread=100)
    assert count == 4
    assert sorted(parts) == [
        ("loop", "interpreter", 0.25),
        ("loop", "kernel: sockets", 0.25),
        ("loop", "msgspec: decode, encode", 0.25),
        ("writer", "kernel: fsync", 0.25),
    ]
    assert dict(symbols)["ext4_sync_file"] == 0.25


def test_parts_that_have_no_name():
    """An interrupt, a page fault and an unknown library are somewhere, too."""
    kernel = "[kernel.kallsyms]"
    assert part([("irq_exit", kernel)]) == "kernel: other"
    assert part([("clear_page", kernel), ("asm_exc_page_fault", kernel)]) == "kernel: memory"
    assert part([("x", "/usr/lib/libssl.so.3")]) == "other"
    assert list(samples([])) == []


def test_without_perf_it_says_what_to_install(tmp_path):
    """A sentence and an exit code, before anything is started."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "profile"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, "apt-get install linux-perf" in ran.stderr) == (1, True)
