"""New words reach the terminal once, old ones never, and nothing that files or terminals do can hurt the run."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.launch.view import View
from farspan.platform.metrics import Journal, Line, plain


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def log(folder: Path, content: bytes) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with (folder / "logs" / "rank-0.log").open("ab") as file:
        file.write(content)


def line(step: int) -> Line:
    return {
        "step": step, "loss": 3.5, "grad_norm": 1.0, "rate": 1e-3, "tokens": 10, "tokens_per_second": 12345.0,
        "step_seconds": 2.0, "mfu": 0.412, "memory_gb": 1.0,
    }  # fmt: skip


def test_a_pipe_gets_every_new_line_once_and_as_it_is(tmp_path: Path) -> None:
    log(tmp_path, b"of an earlier attempt\n")
    out = io.StringIO()
    view = View(tmp_path, 10, out)
    view.poll()
    assert out.getvalue() == ""
    log(tmp_path, b"first\nstep      1  loss 3.5\n[bold]third[/bold]\x1b[0m\nhal")
    view.poll()
    view.poll()
    assert out.getvalue() == "first\nstep      1  loss 3.5\n[bold]third[/bold]\x1b[0m\n"
    log(tmp_path, b"f\nbad \xff\xfe byte\nno end")
    view.say("launch: hello")
    view.poll()
    view.close()
    assert out.getvalue().splitlines()[3:] == ["launch: hello", "half", "bad \ufffd\ufffd byte", "no end"]


def test_files_may_come_late_vanish_and_begin_anew(tmp_path: Path) -> None:
    out = io.StringIO()
    view = View(tmp_path / "not" / "yet", None, out)
    view.poll()
    log(tmp_path / "not" / "yet", b"a longer first line\n")
    view.poll()
    (tmp_path / "not" / "yet" / "logs" / "rank-0.log").unlink()
    view.poll()
    log(tmp_path / "not" / "yet", b"anew\n")
    view.poll()
    view.close()
    assert out.getvalue() == "a longer first line\nanew\n"


def test_an_output_that_cannot_say_it_gets_an_escape(tmp_path: Path) -> None:
    raw = io.BytesIO()
    view = View(tmp_path, None, io.TextIOWrapper(raw, encoding="ascii"))
    log(tmp_path, "naïve\n".encode())
    view.poll()
    assert raw.getvalue() == b"na\\xefve\n"


def test_a_terminal_shows_the_metrics_in_a_bar_and_other_lines_above(tmp_path: Path, terminal: Terminal) -> None:
    old = Journal(tmp_path, 0)
    old.write({**line(77), "loss": 8.8888})
    old.close()
    view = View(tmp_path, 200, terminal)
    view.poll()
    assert "starting" in terminal.getvalue() and "8.8888" not in terminal.getvalue()
    journal = Journal(tmp_path, 1)
    journal.write(line(78))
    journal.write({"step": 78, "eval_loss": 3.25})
    journal.write(line(80))
    log(tmp_path, f"{plain(line(80))}\nsaved [red] a checkpoint\n".encode())
    view.poll()
    shown = terminal.getvalue()
    assert tmp_path.name in shown and "80/200" in shown
    assert "loss 3.5000  12,345 tok/s  mfu 41.2%  held-out 3.2500  0:04:00 left" in shown
    assert shown.count("saved [red] a checkpoint") == 1
    assert "norm 1.00" not in shown  # the worker's own metric line
    view.say("launch: [b]restarting[/b]")
    view.close()
    assert "launch: [b]restarting[/b]" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_torn_line_that_a_restart_cuts_away_costs_no_other(tmp_path: Path, terminal: Terminal) -> None:
    Journal(tmp_path, 0).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')
    view = View(tmp_path, None, terminal)
    view.poll()
    journal = Journal(tmp_path, 1)
    journal.write(line(41))
    view.poll()
    view.close()
    assert "41/?" in terminal.getvalue() and "loss 3.5000" in terminal.getvalue() and " left" not in terminal.getvalue()


def test_a_bar_survives_odd_metrics(tmp_path: Path, terminal: Terminal) -> None:
    view = View(tmp_path, 10, terminal)
    journal = Journal(tmp_path, 0)
    journal.write({"step": 12, "loss": float("nan"), "step_seconds": float("inf"), "mfu": None})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[]\n{}\n")
    view.poll()
    view.close()
    assert "loss nan" in terminal.getvalue() and "mfu" not in terminal.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_closed_output_never_raises(tmp_path: Path, terminal: Terminal, kind: type[io.StringIO]) -> None:
    out = kind()
    view = View(tmp_path, 10, out)
    out.close()
    log(tmp_path, b"unheard\n")
    view.poll()
    view.say("unheard")
    view.close()


def test_a_reader_that_leaves_does_not_spoil_the_exit_code(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from farspan.launch.view import View\n"
        f"view = View(Path({str(tmp_path)!r}), None); sys.stdin.read()\n"
        "[view.say('x' * 1000) for _ in range(500)]; view.close(); sys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdin is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(20) == 7
    assert process.stderr is not None and process.stderr.read() == b""


def test_neither_view_nor_report_loads_torch() -> None:
    script = "import sys, farspan.launch.view, farspan.launch.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
