"""What is printed within `outliving_console` neither blocks nor fails, whatever becomes of the other end."""

import os
import pty
import subprocess
import sys
import time

import pytest

IMPORT = "import os, sys, time\nfrom coterie.runs.outlet import outliving_console, troubles\n"


def started(code, *arguments, **streams):
    return subprocess.Popen([sys.executable, "-c", IMPORT + code, *map(str, arguments)], text=True, **streams)


MANY = """
with outliving_console():
    for number in range(100_000):
        print(f"line {number:06d} of what nobody reads")
    os.write(TELL, str(troubles()).encode())
os.write(TELL, b"; ended")
"""


def result_of(process, pipe):
    with os.fdopen(pipe) as opened:
        found = opened.read()
    return process.wait(60), found


def with_pipe(code, **streams):
    """A process that tells through a pipe how it went on."""
    reading, writing = os.pipe()
    process = started(f"TELL = int(sys.argv[1])\n{code}", writing, pass_fds=[writing], **streams)
    os.close(writing)
    return process, reading


def test_a_full_pipe_holds_nobody_up():
    nobody_reads, end = os.pipe()
    process, reading = with_pipe(MANY, stdout=end)
    os.close(end)
    begun = time.monotonic()
    status, found = result_of(process, reading)
    os.close(nobody_reads)
    assert (status, found) == (0, "{'stdout': 'nobody reads it'}; ended")
    assert time.monotonic() - begun < 30


def test_a_slow_reader_gets_every_line_and_is_waited_for():
    code = "with outliving_console():\n    for number in range(5_000): print(number)"
    process = started(code, stdout=subprocess.PIPE)
    time.sleep(1)
    assert process.stdout.read().split() == [str(number) for number in range(5_000)]
    assert process.wait(60) == 0


def test_a_reader_who_comes_late_is_told_what_was_left_out():
    process = started(MANY.replace("100_000", "60_000").replace("os.write(TELL, ", "str("), stdout=subprocess.PIPE)
    time.sleep(2)
    *lines, note = process.stdout.read().splitlines()
    assert lines == [f"line {number:06d} of what nobody reads" for number in range(len(lines))]
    assert note == f"... {60_000 - len(lines)} lines are left out here: nobody reads it"


@pytest.mark.parametrize(("name", "reason"), [("head", "Broken pipe"), ("/dev/full", "No space left on device")])
def test_an_output_that_fails_costs_nothing_but_itself(name, reason):
    if name == "head":
        other, end = os.pipe()
        os.close(other)
    else:
        end = os.open(name, os.O_WRONLY)
    code = "with outliving_console():\n    print('lost', flush=True); time.sleep(0.5)\n    os.write(TELL, str(troubles()).encode())"
    process, reading = with_pipe(code, stdout=end)
    os.close(end)
    assert result_of(process, reading) == (0, f"{{'stdout': '{reason}'}}")


def test_a_disk_that_has_space_again_is_written_again(tmp_path):
    """A limit on the size of a file stands for the disk."""
    code = """
import resource, signal, errno
from coterie.runs import outlet
outlet._FOR_NOW += (errno.EFBIG,)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
with outliving_console():
    for word in ("first", "dropped", "again"):
        if word == "again":
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        print(word, flush=True)
        time.sleep(0.3)
"""
    log = tmp_path / "log"
    with log.open("w") as opened:
        assert started(code, stdout=opened).wait(60) == 0
    text = log.read_text()
    assert text.startswith("first\n")
    assert "again\n" in text
    assert "1 lines are left out here: File too large" in text


def test_a_closed_terminal_costs_nothing_but_itself():
    ours, theirs = pty.openpty()
    code = "with outliving_console():\n    print(sys.stdout.isatty(), flush=True)\n    time.sleep(1)\n" + (
        "    print('lost', flush=True); time.sleep(0.3)\n    os.write(TELL, str(troubles()).encode())"
    )
    process, reading = with_pipe(code, stdout=theirs)
    os.close(theirs)
    assert os.read(ours, 100) == b"True\r\n"
    os.close(ours)
    assert result_of(process, reading) == (0, "{'stdout': 'Input/output error'}")


def test_both_streams_of_one_file_keep_their_order(tmp_path):
    code = "with outliving_console():\n    for n in range(500): print(n, file=(sys.stdout, sys.stderr)[n % 2])"
    with (tmp_path / "log").open("w") as opened:
        assert started(code, stdout=opened, stderr=subprocess.STDOUT).wait(60) == 0
    assert (tmp_path / "log").read_text().split() == [str(n) for n in range(500)]


def test_a_forked_process_prints_by_itself():
    code = "with outliving_console():\n    print('one', flush=True); time.sleep(0.2)\n    if not os.fork():\n        print('two', flush=True)\n        os._exit(0)\n    os.wait()\n    print('three')"
    process = started(code, stdout=subprocess.PIPE)
    assert process.communicate()[0] == "one\ntwo\nthree\n"


def test_a_stream_that_somebody_put_there_stays(capsys):
    from coterie.runs.outlet import outliving_console

    before = sys.stdout
    with outliving_console():
        assert sys.stdout is before
        print("seen")
    assert capsys.readouterr().out == "seen\n"
