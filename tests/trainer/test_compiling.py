"""Whether torch.compile works on this machine is checked before a training begins."""

import shutil
from pathlib import Path

import pytest
import torch

from gkd.trainer.device import require_compiler
from tests.commands.running import fails
from tests.trainer.faces import SMALL

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_machine_that_compiles_is_accepted() -> None:
    require_compiler(torch.device("cpu"))


def test_a_machine_without_a_compiler_is_refused_at_once(faces: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    settings = [word for each in (*SMALL, "train.compile=true") for word in ("--set", each)]
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("/bin/false",)}):
        error = fails(
            "train-student", faces / "faces", "-", tmp_path / "run", "--without-kd", *settings
        )
    message = error.splitlines()[-1]  # torch's compilers may print lines of their own before
    assert "train.compile: torch.compile does not work here" in message
    assert "or set train.compile=false" in message
    assert not (tmp_path / "run").exists()
