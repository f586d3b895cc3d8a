"""Another machine through OpenSSH: a stand-in client, and a real server where there is one."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_for_tests import invoke
from processes_for_tests import ended

from edgec.bench.devices import _remote, open_device, ssh
from edgec.bench.harness import BenchSettings, Contestant, run_bench
from edgec.bench.jobs import Job
from edgec.errors import BenchError, UsageError

QUICK = BenchSettings(rounds=1, samples=1, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)


# Names and quoting


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-oProxyCommand=touch /tmp/owned",
        "user@-oProxyCommand=x",
        "-l@host",
        "host;rm -rf /",
        "host$(id)",
        "host`id`",
        "us er@host",
        "host:0",
        "host:99999",
        "host:22:22",
        "host/../..",
        "host\nother",
        "a@b@c",
        "[::1",
    ],
)
def test_what_is_no_host_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected ssh:"):
        open_device(f"ssh:{name}")


def test_folders_that_a_device_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEC_SSH_TMP", "/data/data/com.termux/files/usr/tmp")
    assert ssh.create("phone:8022")._temporary == "/data/data/com.termux/files/usr/tmp"
    for bad in ("tmp", "/", "/tmp/../etc", "/tmp;id", "/tmp/$(id)", "~"):
        monkeypatch.setenv("EDGEC_SSH_TMP", bad)
        with pytest.raises(UsageError, match="EDGEC_SSH_TMP"):
            ssh.create("phone")


def test_hosts_as_people_type_them() -> None:
    for name in ("pi", "pi@raspberrypi.local", "user@10.0.0.7:2222", "user@[fe80::1]:22"):
        assert open_device(f"ssh:{name}").name


@pytest.mark.parametrize("word", ["a b", "$(id)", "`id`", "'; id; '", '"x"', "a\\b", "*", "~", "-rf", "ä", ""])
def test_words_arrive_as_they_are(word: str) -> None:
    done = subprocess.run(["sh", "-c", _remote.quoted(["printf", "%s", word])], capture_output=True, check=True)
    assert done.stdout.decode() == word


def test_control_characters_are_refused() -> None:
    for word in ("a\nb", "a\0b", "\x1b[2J"):
        with pytest.raises(BenchError, match="control character"):
            _remote.quoted(["printf", word])


def test_links_are_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    assert _remote.pushable(tmp_path) == tmp_path.resolve()
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(BenchError, match="only plain files are pushed"):
        _remote.pushable(tmp_path)


# A stand-in for OpenSSH's client: the far side is this machine, through a real shell

_SSH = r"""#!/bin/sh
printf '%s\n' "$*" >> "$FAKE_LOG"
while [ "$1" != "--" ]; do shift; done
shift 2
{trouble}
exec sh -c "$1"
"""
_SCP = r"""#!/bin/sh
printf 'scp %s\n' "$*" >> "$FAKE_LOG"
while [ $# -gt 2 ]; do shift; done
exec cp -R "$1" "${2#*:}"
"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs named ssh and scp before the real ones; returns their folder."""
    return _stand_in(tmp_path, monkeypatch)


def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str = "") -> Path:
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("ssh", _SSH.replace("{trouble}", trouble)), ("scp", _SCP)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("EDGEC_SSH_PYTHON", sys.executable)
    return programs


def test_a_remote_machine_measures(far: Path, encoder_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's $(odd) ; name"
    shutil.copytree(encoder_folder, odd)
    device = ssh.create("user@far.example:2222")
    rows = run_bench([Contestant("a", encoder_folder), Contestant("b", odd)], QUICK, device=device)
    assert [row.device for row in rows] == ["ssh:user@far.example:2222"] * 2
    assert all(row.metrics["items_s"].value > 0 for row in rows)
    assert not any("failed" in note or "incomplete" in note for row in rows for note in row.notes)
    folder = Path(device._folder)
    assert sorted(p.name for p in folder.iterdir()) == ["artifact0", "artifact1", "edgec", "worker.pid"]
    device.close()
    assert not folder.exists()
    for line in (tmp_path / "log").read_text().splitlines():
        assert "BatchMode=yes" in line


def test_the_machine_describes_itself(far: Path) -> None:
    device = ssh.create("far")
    told = device.describe()
    assert told["cores"].endswith("physical")
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    device.close()


def test_a_machine_that_cannot_be_reached_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    _stand_in(tmp_path, monkeypatch, trouble="echo 'ssh: connect to host far: No route to host' >&2; exit 255")
    with pytest.raises(BenchError, match=r"ssh:far: mktemp failed there: exit status 255: .*No route to host"):
        run_bench([Contestant("a", encoder_folder)], BenchSettings(rounds=1), device=ssh.create("far"))


@pytest.mark.parametrize("answer", ["/", "/etc", "", "/tmp/edgec-bench.abc/../../etc", "/tmp/x; rm -rf /"])
def test_a_folder_that_mktemp_cannot_have_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    _stand_in(tmp_path, monkeypatch, trouble=f"case \"$1\" in mktemp*) printf '%s\\n' '{answer}'; exit 0;; esac")
    device = ssh.create("far")
    with pytest.raises(BenchError, match="mktemp answered"):
        device.describe()
    device.close()
    assert "rm -rf" not in (tmp_path / "log").read_text()


def test_endless_answers_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, monkeypatch, trouble="exec yes far")
    with pytest.raises(BenchError, match="wrote more than"):
        ssh.create("far").describe()


def test_a_disconnect_keeps_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path) -> None:
    """The line drops after the first sample of the worker."""
    cut = 'case "$1" in *edgec.bench.worker*) sh -c "$1" | head -n 3; echo "Connection closed" >&2; exit 255;; esac'
    _stand_in(tmp_path, monkeypatch, trouble=cut)
    settings = BenchSettings(rounds=1, samples=2, warmup=0, min_sample_s=0.0, batch=2, threads=1, timeout_s=120)
    device = ssh.create("far")
    rows = run_bench([Contestant("a", encoder_folder)], settings, device=device)
    device.close()
    assert rows[0].metrics["items_s"].value > 0
    assert any(n.startswith("incomplete") and "Connection closed" in n and "1 of 2" in n for n in rows[0].notes)


@pytest.mark.slow
def test_the_command_tells_what_a_lost_machine_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder_artifact: Path
) -> None:
    """After the line has dropped in the first round nothing answers any more: the samples come out all the same."""
    gone = tmp_path / "gone"
    cut = f'[ -e {gone} ] && {{ echo "No route to host" >&2; exit 255; }}\n'
    cut += f'case "$1" in *edgec.bench.worker*) sh -c "$1"; touch {gone}; exit 0;; esac'
    _stand_in(tmp_path, monkeypatch, trouble=cut)
    elsewhere = "onnx-x64" if platform.machine() in ("aarch64", "arm64") else "onnx-arm64"
    folder = shutil.copytree(encoder_artifact, tmp_path / "small")
    manifest = json.loads((folder / "edgec.json").read_text())
    (folder / "edgec.json").write_text(json.dumps({**manifest, "target": elsewhere}))
    report = tmp_path / "report.html"
    words = ("--device", "ssh:user@far.example", "--rounds", "2", "--threads", "1", "--json", "--report", report)
    said = invoke(capsys, "bench", folder, *words)
    assert said.code == 0, said
    found = json.loads(said.out)
    (row,) = found["measurements"]
    assert row["metrics"]["items_s"]["n"] == 1
    assert any(note.startswith("incomplete") and "No route to host" in note for note in row["notes"])
    assert found["machine"]["processor"] == platform.machine()
    assert f"exported for {elsewhere}, measured on another kind of processor" in row["notes"]
    assert "user@far.example" in report.read_text()


# A worker that was given up on

_STUCK = """#!/bin/sh
case "$*" in
    *edgec.bench.worker*) echo $$ > {pid}; exec {python} -c 'import time; time.sleep(100)' edgec.bench.worker;;
    *) exec {python} "$@";;
esac
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("setsid") is None, reason="reads /proc, needs setsid")
@pytest.mark.parametrize("hidden", [[], ["timeout"]])
def test_a_worker_that_hangs_is_ended_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path, hidden: list[str]
) -> None:
    """The far side runs in a session of its own, as behind a real line: our killing the client does not reach it."""
    far_side = 'exec setsid sh -c "$1"'
    if hidden:  # a machine without `timeout`, as a Mac
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in ("sh", "env", "mktemp", "rm", "cat", "tr", "ps", "kill", "sleep"):
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        far_side = f'PATH={tools} exec {shutil.which("setsid")} sh -c "$1"'
    _stand_in(tmp_path, monkeypatch, trouble=far_side)
    python = tmp_path / "python"
    python.write_text(_STUCK.format(pid=tmp_path / "stuck.pid", python=sys.executable))
    python.chmod(stat.S_IRWXU)
    monkeypatch.setenv("EDGEC_SSH_PYTHON", str(python))
    device = ssh.create("far")
    job = Job(str(encoder_folder), "encoder", 1, sentences=("a",))
    finished = device.measure(job, timeout_s=2, on_line=lambda line: True)
    assert finished.stopped == "timeout"
    assert ended(int((tmp_path / "stuck.pid").read_text()))
    device.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_another_program_with_the_same_number_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    _stand_in(tmp_path, monkeypatch)
    device = ssh.create("far")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        (Path(device._home()) / "worker.pid").write_text(str(other.pid))
        device._end(f"{device._home()}/worker.pid")
        assert other.poll() is None
        other.kill()
    device.close()


# A real server on this machine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An sshd of our own on a free port, with keys of its own; skipped where none is installed or it will not start."""
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no sshd here (Debian: openssh-server)")
    room = tmp_path / "sshd"
    room.mkdir(mode=0o700)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", room / name], check=True)
    shutil.copy(room / "client.pub", room / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (room / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {room}/host\nAuthorizedKeysFile {room}/authorized\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
        f"PidFile {room}/pid\nSubsystem sftp internal-sftp\n"
    )
    key = (room / "host.pub").read_text().split()
    (room / "known").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    (room / "config").write_text(
        f"IdentityFile {room}/client\nIdentitiesOnly yes\nUserKnownHostsFile {room}/known\nStrictHostKeyChecking yes\n"
    )
    process = subprocess.Popen([found, "-D", "-e", "-f", room / "sshd_config"], stderr=subprocess.PIPE)
    try:
        for _ in range(100):
            if process.poll() is not None:
                pytest.skip(f"sshd does not start here: {process.stderr.read().decode()[-200:]}")  # type: ignore[union-attr]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        monkeypatch.setenv("EDGEC_SSH_CONFIG", str(room / "config"))
        monkeypatch.setenv("EDGEC_SSH_PYTHON", sys.executable)
        yield f"{getpass.getuser()}@127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_a_real_server(server: str, lm_folder: Path) -> None:
    device = ssh.create(server)
    rows = run_bench(
        [Contestant("a", lm_folder)],
        BenchSettings(rounds=2, samples=1, warmup=0, min_sample_s=0.0, prompt_tokens=8, new_tokens=4, threads=1),
        device=device,
    )
    folder = Path(device._folder)
    assert folder.is_dir()
    device.close()
    assert not folder.exists()
    assert rows[0].metrics["decode_tok_s"].value > 0
    assert rows[0].device == f"ssh:{server}"
    assert not any("failed" in note for note in rows[0].notes)


def test_a_real_server_that_does_not_know_us(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Path(os.environ["EDGEC_SSH_CONFIG"])
    (tmp_path / "config").write_text(config.read_text().replace("/client", "/host"))
    monkeypatch.setenv("EDGEC_SSH_CONFIG", str(tmp_path / "config"))
    with pytest.raises(BenchError, match="Permission denied"):
        ssh.create(server).describe()


def test_a_real_server_ends_a_worker_that_hangs(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder_folder: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(_STUCK.format(pid=tmp_path / "stuck.pid", python=sys.executable))
    python.chmod(stat.S_IRWXU)
    monkeypatch.setenv("EDGEC_SSH_PYTHON", str(python))
    device = ssh.create(server)
    job = Job(str(encoder_folder), "encoder", 1, sentences=("a",))
    assert device.measure(job, timeout_s=3, on_line=lambda line: True).stopped == "timeout"
    assert ended(int((tmp_path / "stuck.pid").read_text()))
    device.close()
