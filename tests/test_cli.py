"""The command line: what is said, where, and with which exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest
from onnx_graphs import CASES
from subprocesses import python

import fastbn
from fastbn.cli import main

FULL = Path("/dev/full")


def run(*arguments, **options):
    command = [sys.executable, "-m", "fastbn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_module_and_script_are_one():
    assert run("--version").stdout == f"fastbn {fastbn.__version__}\n"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fastbn": f"{main.__module__}:{main.__name__}"}


def test_info_is_show_config(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    fastbn.show_config()
    assert printed == capsys.readouterr().out
    assert fastbn.__version__ in printed
    assert fastbn.get_backend() in printed


def test_info_with_an_impossible_environment():
    result = run("info", env=os.environ | {"FASTBN_BACKEND": "fortran"})
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.startswith("fastbn info: error: FASTBN_BACKEND")
    assert "fortran" in result.stderr
    assert result.stderr.count("\n") == 1


def test_info_with_an_impossible_pool():
    result = run("info", env=os.environ | {"FASTBN_POOL_LIMIT": "much"})
    assert result.returncode == 2
    assert result.stderr.startswith("fastbn info: error: FASTBN_POOL_LIMIT must be a number of bytes")
    assert "output pool" in run("info").stdout


@pytest.mark.parametrize(
    "arguments, words",
    (
        ([], "COMMAND"),
        (["dance"], "'dance'"),
        (["info", "more"], "more"),
        (["fold"], "IN"),
        (["demo", "--epochs", "0"], "an integer of at least 1, got '0'"),
        (["demo", "--epochs", "1.5"], "got '1.5'"),
        (["demo", "--seed", "-1"], "an integer from 0 to 4294967295, got '-1'"),
        (["demo", "--seed", "4294967296"], "got '4294967296'"),
        (["demo", "--backend", "fortran"], "'fortran'"),
        (["demo", "--data"], "--data"),
    ),
)
def test_wrong_arguments_take_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert words in printed.err
    assert printed.err.startswith("fastbn")
    assert printed.err.count("\n") == 1


def test_fold_is_there(tmp_path, capsys):
    assert main(["fold", str(tmp_path / "missing.onnx")]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "missing.onnx" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", ([], ["demo"], ["fold"], ["info"]))
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    assert "usage: fastbn" in capsys.readouterr().out


def test_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(fastbn, "show_config", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-m", "fastbn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_printed(tmp_path):
    model, folded = tmp_path / "model.onnx", tmp_path / "model.folded.onnx"
    onnx.save(CASES["two_convs"].build(), model)
    commands = (("info",), "the output cannot be printed"), (("fold", str(model)), f"{folded} has been written")
    for arguments, words in commands:
        with FULL.open("w") as full:
            command = [sys.executable, "-m", "fastbn", *arguments]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert result.returncode == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    assert folded.exists()


def test_names_that_the_output_has_no_letters_for(tmp_path):
    model = tmp_path / "mödel ☃.onnx"
    onnx.save(CASES["two_convs"].build(), model)
    result = run("fold", str(model), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert "m\\xf6del \\u2603.folded.onnx" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="its shell closes nothing")
def test_no_output_at_all():
    command = f"{sys.executable} -m fastbn info >&-"
    result = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_help_loads_nothing_heavy():
    code = """
import sys
from fastbn.cli import main
try:
    main(["demo", "--help"])
except SystemExit:
    pass
heavy = {"numba", "fastbn_ext", "sklearn", "onnx", "onnxruntime", "matplotlib", "rich", "fastbn.demo"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    python(code)
