"""Other processes: capped in output and time, killed with their children, never a shell."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest
from processes_for_tests import ended

from edgec.errors import EdgecError, RuntimeUnavailableError
from edgec.subprocesses import run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_and_status_come_back() -> None:
    done = run(python("import sys; print(sys.stdin.read().upper()); sys.exit(3)"), stdin=b"abc", timeout_s=20)
    assert (done.stdout, done.returncode, done.stopped, done.ok) == (b"ABC\n", 3, "", False)
    assert run(python("print(1)"), timeout_s=20).ok


def test_a_program_that_never_ends_is_stopped_when_asked() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    done = run(python("import time; time.sleep(60)"), timeout_s=30, stop=stop)
    assert done.stopped == "asked" and not done.ok and done.seconds < 20


def test_arguments_are_not_interpreted() -> None:
    text = "$(touch /tmp/never); `id` && echo 'x' | cat > \"y\" *"
    assert run([*python("import sys; print(sys.argv[1])"), text], timeout_s=20).stdout.decode().strip() == text


def test_lines_arrive_whole_and_can_stop_the_process() -> None:
    lines: list[bytes] = []
    code = "import sys,time\nfor i in range(100000): print('line', i, flush=True)"

    def take(line: bytes) -> bool:
        lines.append(line)
        return len(lines) < 3

    done = run(python(code), timeout_s=20, on_line=take)
    assert lines == [b"line 0", b"line 1", b"line 2"] and done.stopped == "consumer"


def test_a_hang_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    started = time.monotonic()
    done = run(python(code), timeout_s=2)
    assert done.stopped == "timeout" and time.monotonic() - started < 15
    assert "without finishing" in done.reason()
    assert ended(int(pid_file.read_text()), seconds=5)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("newline", [True, False])
def test_endless_output_is_capped(stream: str, newline: bool) -> None:
    text = "'x' * 65535 + '\\n'" if newline else "'x' * 65536"
    code = f"import sys\nwhile True: sys.{stream}.write({text})"
    done = run(python(code), timeout_s=30, max_output_bytes=1 << 20, on_line=lambda line: True)
    assert done.stopped == "output" and len(done.stdout) <= 1 << 20 and len(done.stderr) <= 1 << 16


def test_a_crash_names_the_signal_and_the_last_words() -> None:
    done = run(
        python("import os, sys; sys.stderr.write('last words\\n'); sys.stderr.flush(); os.abort()"), timeout_s=20
    )
    assert not done.ok and "SIGABRT" in done.reason() and "last words" in done.reason()


def test_stdin_that_nobody_reads_is_no_deadlock() -> None:
    assert run(python("pass"), stdin=b"x" * (1 << 22), timeout_s=20).ok


def test_what_cannot_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no-such-program"):
        run(["no-such-program-at-all"], timeout_s=5)
    plain = tmp_path / "plain"
    plain.write_text("x")
    with pytest.raises(EdgecError, match="could not be started"):
        run([plain], timeout_s=5)
    with pytest.raises(EdgecError, match="NUL"):
        run(["echo", "a\0b"], timeout_s=5)


def test_the_environment_is_the_one_given() -> None:
    done = run(python("import os; print(os.environ.get('HOME'), os.environ['A'])"), env={"A": "1"}, timeout_s=20)
    assert done.stdout.decode().split() == ["None", "1"]
    assert "A" not in os.environ or os.environ["A"] != "1"
