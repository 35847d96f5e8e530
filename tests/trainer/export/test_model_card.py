"""Exported students: the code in their cards, run in a process that cannot import gkd."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import torch
from PIL import Image

from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.util.files import sha256_file
from gkd.trainer.backbones import load_backbone
from gkd.trainer.checkpoint import (
    RunData,
    Student,
    load_student,
    student_backbone,
    write_checkpoint,
)
from gkd.trainer.config_file import load_config
from gkd.trainer.evaluation.embed import module_embed
from gkd.trainer.export.model_card import card_text, export_student
from tests.trainer.backbones import published_networks

NETWORKS = Path(published_networks.__file__)
FINGERPRINT, CACHE, TEACHER = "fa" * 32, "ca" * 32, "7e" * 32
SMALL = ("student.name=iresnet18", "student.width=0.125", "student.input_size=28")
RUN_JSON = {
    "command": ["gkd", "train-student", "/home/alice/ms1m", "/scratch/t.gkd", "/home/alice/run"],
    "versions": {"python": "3.11.4", "gkd": "0.1.0", "torch": "2.6.0"},
    "ranks": 1,
    "device": "cpu",
    "precision": "float32",
    "dataset": {
        "name": "ms1m",
        "path": "/home/alice/ms1m",
        "num_images": 5_822_653,
        "num_classes": 85_742,
        "dataset": FINGERPRINT,
        "cache_id": CACHE,
    },
    "teacher": {"name": "r50", "arch": "iresnet50", "sha256": TEACHER, "embedding_dim": 512},
    "parameters": {"backbone": 1, "head": 1},
    "total_steps": 909_000,
}


def write_run(folder: Path, *settings: str, **more: object) -> Path:
    """A run folder with a student whose weights and statistics look trained."""
    config = load_config(None, ["student.embedding_dim=24", *settings])
    torch.manual_seed(0)
    model = student_backbone(config.student)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            if key.endswith("running_var"):
                value.uniform_(0.5, 2)
        model(torch.randn(4, 3, 112, 112))
    (folder / "checkpoints").mkdir(parents=True)
    content = {
        "config": msgspec.to_builtins(config),
        "data": [5_822_653, 85_742, FINGERPRINT, CACHE],
        "model": model.state_dict(),
        "step": 909_000,
        "accuracy": {"lfw": 0.9965, "cfp_fp": 0.9512},
        **more,
    }
    write_checkpoint(folder / "checkpoints/best.pt", content)
    (folder / "run.json").write_text(json.dumps(RUN_JSON))
    return folder


def code_of(card: Path) -> list[str]:
    """The lines of the only Python block of a card."""
    (block,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return str(block).splitlines()


def face() -> npt.NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def embedding_without_gkd(folder: Path, lines: list[str]) -> npt.NDArray[Any]:
    """The value of ``embeddings`` after the lines, in a process that cannot import gkd."""
    networks = folder / "published/backbones"
    networks.mkdir(parents=True)
    (networks / "__init__.py").write_text(NETWORKS.read_text())
    (networks / "mobilefacenet.py").write_text("from backbones import MobileFaceNet\n")
    Image.fromarray(face()).save(folder / "face.png")
    script = [
        "import sys",
        "sys.modules['gkd'] = None",
        "try:",
        "    import gkd",
        "except ImportError:",
        "    pass",
        "else:",
        "    raise SystemExit('gkd was imported')",
        *lines,
        "import numpy",
        "numpy.save('embeddings.npy', embeddings)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "published"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(np.load(folder / "embeddings.npy"))


def embedding_here(run: Path) -> npt.NDArray[np.float32]:
    """The embedding that gkd itself computes."""
    student = load_student(run)
    embed = module_embed(student.backbone, preprocess_preset("arcface"), torch.device("cpu"))
    return embed(face()[None])


@pytest.mark.parametrize(
    ("settings", "built"),
    [
        (("student.name=mobilefacenet",), 'get_model("mbf", fp16=False, num_features=24)'),
        (
            ("student.name=mobilefacenet", "student.width=1"),
            "MobileFaceNet(num_features=24, scale=1)",
        ),
    ],
)
def test_five_lines_load_the_weights_without_gkd(
    tmp_path: Path, settings: tuple[str, ...], built: str
) -> None:
    run = write_run(tmp_path / "run", *settings)
    exported = export_student(run, tmp_path / "student.safetensors")
    lines = code_of(exported.card)
    assert len(lines) == 5
    assert built in lines[2]
    use = [
        "import torch, numpy",
        "from PIL import Image",
        "pixels = torch.from_numpy(numpy.array(Image.open('face.png'))).permute(2, 0, 1)[None]",
        "with torch.no_grad():",
        "    embeddings = model((pixels - 127.5) / 127.5).numpy()",
    ]
    got = embedding_without_gkd(tmp_path, [*lines, *use])
    expected = embedding_here(run)
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(np.linalg.norm(expected)))


@pytest.mark.parametrize(
    ("settings", "built"),
    [
        (("student.name=iresnet18",), 'get_model("r18", fp16=False, num_features=512)'),
        (("student.name=vit_t", "student.embedding_dim=24"), 'get_model("vit_t", fp16=False, num_'),
        (
            ("student.name=vit_l",),
            'get_model("vit_l_dp005_mask_005", fp16=False, num_features=512)',
        ),
        (("student.name=ir_se_50",), "model = IR_SE_50(input_size=(112, 112))"),
        (("student.name=evolve_ir_101",), "model = IR_101([112, 112])"),
        (("student.name=ir_50", "student.embedding_dim=24"), "load_backbone("),
        (("student.name=mbf_large", "student.width=2"), "load_backbone("),
    ],
)
def test_the_card_builds_each_network_in_its_codebase(
    settings: tuple[str, ...], built: str
) -> None:
    config = load_config(None, settings)
    student = Student(torch.nn.Linear(1, 1), config, RunData(9, 3, FINGERPRINT, ""), 1, {})
    text = card_text(student, None, file="s.safetensors", sha256="0")
    assert built in text


@pytest.fixture(scope="module")
def exported_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/ and student.onnx."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    run = write_run(folder / "run", *SMALL)
    export_student(run, folder / "student.onnx")
    return folder


def test_the_code_of_the_card_runs_the_onnx_file_without_gkd(exported_onnx: Path) -> None:
    got = embedding_without_gkd(exported_onnx, code_of(exported_onnx / "student.onnx.md"))
    expected = embedding_here(exported_onnx / "run")
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.linalg.norm(expected)))


def test_the_metadata_suffices_to_run_an_onnx_file(exported_onnx: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    run, out = exported_onnx / "run", exported_onnx / "student.onnx"
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    channels, height, width = json.loads(metadata["input_shape"])
    assert (channels, height, width) == face().transpose(2, 0, 1).shape
    assert metadata["channel_order"] == "RGB"
    mean, std = (np.array(json.loads(metadata[f"preprocess_{k}"])) for k in ("mean", "std"))
    images = ((face() - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    (got,) = session.run(["embedding"], {"input": images})
    assert got.shape == (1, int(metadata["embedding_dim"]))
    expected = embedding_here(run)
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.linalg.norm(expected)))


def test_weights_carry_the_metadata_and_load_into_gkd(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *SMALL)
    exported = export_student(run, tmp_path / "student.safetensors")
    with safetensors.safe_open(exported.path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["embedding_dim"], metadata["channel_order"], metadata["name"]) == (
        *("24", "RGB"),
        "iresnet18",
    )
    assert json.loads(metadata["input_shape"]) == [3, 112, 112]
    loaded = load_backbone("auto", exported.path).module
    embed = module_embed(loaded, preprocess_preset("arcface"), torch.device("cpu"))
    np.testing.assert_array_equal(embed(face()[None]), embedding_here(run))
    lines = code_of(exported.card)
    assert (
        "No published network has this width, input size or embedding length"
        in exported.card.read_text()
    )
    assert 'load_backbone("auto", Path("student.safetensors"))' in lines[-1]


def test_the_card_describes_the_student_and_contains_no_paths(tmp_path: Path) -> None:
    sets = "evaluation.sets=['/home/alice/sets/lfw.bin', '/home/alice/sets/cfp_fp.bin']"
    run = write_run(tmp_path / "run", *SMALL, sets)
    exported = export_student(
        *(run, tmp_path / "deep/student.safetensors"),
        licence="For research.",
        note="The small one.",
    )
    assert exported.card == tmp_path / "deep/student.safetensors.md"
    text = exported.card.read_text()
    for text_part in (
        "# `student.safetensors`",
        "The small one.",
        "`iresnet18` of width 0.125, ",
        "pools them to 28x28",
        f"sha256 of the file: `{sha256_file(exported.path)}`",
        f"Data: `ms1m`, 5,822,653 images of 85,742 identities, fingerprint `{FINGERPRINT}`",
        f"Targets: of the cache `{CACHE}`",
        f"Teacher: `r50`, `iresnet50`; sha256 of its weights `{TEACHER}`",
        "Steps: 909,000 of 128 images",
        "gkd 0.1.0, torch 2.6.0",
        "| `lfw` | 99.65% |",
        "| `cfp_fp` | 95.12% |",
        'sets = ["lfw.bin", "cfp_fp.bin"]',
        "temperature = 4.0",
        "(x - 127.5) / 127.5",
        "For research.",
    ):
        assert text_part in text
    parameters = sum(p.numel() for p in load_student(run).backbone.parameters())
    assert f"{parameters:,} parameters" in text
    assert "alice" not in text
    assert "/scratch" not in text
    assert str(tmp_path) not in text
    assert exported.to_builtins()["sha256"] == sha256_file(exported.path)


def test_the_card_of_a_checkpoint_without_its_run_omits_what_is_unknown(tmp_path: Path) -> None:
    data = [10, 3, FINGERPRINT, ""]
    run = write_run(tmp_path / "run", *SMALL, "kd.enabled=false", data=data, accuracy={})
    checkpoint = run / "checkpoints/best.pt"
    text = export_student(checkpoint, tmp_path / "a.safetensors").card.read_text()
    assert "Data: `ms1m`, 10 images of 3 identities" in text
    assert "Teacher: none, trained by cross-entropy alone" in text
    assert "It was not evaluated" in text
    assert "No licence was stated." in text
    (run / "run.json").unlink()
    text = export_student(run, tmp_path / "b.safetensors").card.read_text()
    assert "Data: 10 images of 3 identities" in text
    (run / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: expected a file of `gkd train-student`"):
        export_student(run, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("name", ["student.pt", "student"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends in .onnx or .safetensors"):
        export_student(tmp_path, tmp_path / name)
