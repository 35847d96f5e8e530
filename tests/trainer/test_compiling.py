"""Whether torch.compile works here is told before a training begins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gkd.trainer.device import require_compiler
from tests.paths import ROOT
from tests.trainer.faces import SMALL


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_machine_that_compiles_is_taken() -> None:
    require_compiler(torch.device("cpu"))


def test_a_machine_without_a_compiler_is_told_at_once(faces: Path, tmp_path: Path) -> None:
    settings = [word for each in (*SMALL, "train.compile=true") for word in ("--set", each)]
    command = ["train-student", faces / "faces", "-", tmp_path / "run", "--without-kd", *settings]
    done = subprocess.run(
        [sys.executable, "-m", "gkd.cli", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]  # torch's compilers may have words of their own before
    assert "train.compile: torch.compile does not work here" in message
    assert "or set train.compile=false" in message
    assert not (tmp_path / "run").exists()
