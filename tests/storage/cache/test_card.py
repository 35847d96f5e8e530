"""The card describes a cache, follows from it alone, and is covered by the manifest."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from gkd.storage.cache import layout
from gkd.storage.cache.card import card_text, join_terms, read_terms, write_card
from gkd.storage.cache.metadata import read_commit
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CentersSpec, DerivedSpec, DrawsSpec, TeacherSpec, View
from gkd.storage.cache.verify import verify
from gkd.storage.cache.writer import CacheWriter
from tests.caches import make_spec, write_shard


@dataclass(frozen=True)
class Made:
    path: Path
    text: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    writer = CacheWriter(tmp_path_factory.mktemp("made") / "c.gkd", make_spec())
    for shard in range(3):
        write_shard(writer, shard, skipped={41: "no image"})
    write_card(writer.path, licence="CC BY-NC 4.0", note="Made for the reading group.")
    writer.finish()
    return Made(writer.path, (writer.path / layout.CARD).read_text())


def test_a_card_says_what_made_the_cache(made: Made) -> None:
    cache = Cache.open(made.path)
    assert cache.manifest is not None
    mean = cache.manifest.entries["flipped"] / 99
    for text in (
        "# What `teacher.onnx` says of `faces`\n",
        "\nMade for the reading group.\n",
        "- Targets of 99 images of 50 identities; 1 more could not be read and have no targets\n",
        f"- View flipped: {mean:.1f} identities an image on average, at most 20, where "
        f"{cache.manifest.truncated['flipped']} groups were cut\n",
        "embeddings of length 128; sha256 of its weights `" + "1" * 64 + "`\n",
        "- Its input: pixels as `arcface` has them, RGB; arithmetic in float32\n",
        "- Centres of the identities: the mean of each identity's embeddings; sha256 `2222",
        "- Data: `faces`, 100 images of 50 identities, fingerprint `3333",
        "with 0.9 of the probability at temperature 2, and the label\n",
        "- Temperatures that a student may be trained at: 1, 2, 4\n",
        "## Terms\n\nCC BY-NC 4.0\n",
        "    gkd targets pull ADDRESS faces.gkd\n    gkd train-student RECORDS faces.gkd RUN\n",
    ):
        assert text in made.text


def test_a_card_is_covered_by_the_manifest(made: Made) -> None:
    cache = Cache.open(made.path)
    assert cache.manifest is not None
    assert cache.manifest.files[layout.CARD] == layout.file_record(made.path / layout.CARD)
    assert verify(made.path).ok


def test_the_bytes_follow_from_the_cache_alone(made: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.path, tmp_path / "elsewhere.gkd"))
    (copy / layout.MANIFEST).unlink()
    (copy / f".{layout.CARD}.{'0' * 32}").write_text("what a killed writer left")
    write_card(copy, licence="CC BY-NC 4.0", note="Made for the reading group.")
    assert (copy / layout.CARD).read_text() == made.text
    assert not list(copy.glob(".*"))


def test_a_card_without_a_licence_says_so(made: Made) -> None:
    spec = make_spec()
    commits = [read_commit(made.path, spec, shard) for shard in range(3)]
    assert "## Terms\n\nNo licence was stated. Ask whoever" in card_text(spec, commits)


def test_a_card_names_other_ways_of_making_a_cache(made: Made) -> None:
    spec = msgspec.structs.replace(
        make_spec(draws=DrawsSpec(16, 4.0, "all")),
        centers=CentersSpec("file", "rank_0.pt", "2" * 64),
        derived=DerivedSpec("retarget", ("4" * 64,)),
    )
    text = card_text(spec, [read_commit(made.path, make_spec(), shard) for shard in range(3)])
    assert "- Centres of the identities: `rank_0.pt`; sha256" in text
    assert "- And 16 identities an image drawn with replacement at temperature 4, of all\n" in text
    assert "- Made without the teacher, by retarget, from `4444" in text


@pytest.mark.parametrize("licence", [None, "CC BY-NC 4.0", "One.\n\n## Terms\n\nTwo."])
@pytest.mark.parametrize("note", [None, "Made for the reading group.\n\nAnd others."])
def test_licence_and_note_are_read_back_from_the_card(
    made: Made, tmp_path: Path, licence: str | None, note: str | None
) -> None:
    copy = Path(shutil.copytree(made.path, tmp_path / "copy.gkd"))
    (copy / layout.MANIFEST).unlink()
    write_card(copy, licence=licence, note=note)
    assert read_terms(copy) == (licence, note)


def test_another_card_has_no_licence_and_no_note(tmp_path: Path) -> None:
    assert read_terms(tmp_path) == (None, None)
    (tmp_path / layout.CARD).write_text("# Another card\n\n## Terms\n\nNone.\n")
    assert read_terms(tmp_path) == (None, None)


def test_licences_and_notes_of_several_caches_are_joined(made: Made, tmp_path: Path) -> None:
    def card(licence: str | None, note: str | None) -> Path:
        copy = Path(shutil.copytree(made.path, tmp_path / str(len(list(tmp_path.iterdir())))))
        (copy / layout.MANIFEST).unlink()
        write_card(copy, licence=licence, note=note)
        return copy

    same = [card("Research.", "Faces."), card("Research.", "Faces.")]
    assert join_terms(same) == ("Research.", "Faces.")
    licence, note = join_terms([*same, card(None, None), card("Free.", None)])
    assert licence == (
        "Of cache 1: Research.\n\nOf cache 2: Research.\n\nOf cache 3: No licence was stated. Ask "
        "whoever gave you this cache before you use it or pass it on.\n\nOf cache 4: Free."
    )
    assert note == "Of cache 1: Faces.\n\nOf cache 2: Faces."
    assert join_terms([card(None, None), card(None, None)]) == (None, None)


def test_a_card_names_a_training_command_for_its_views(made: Made) -> None:
    def text(*views: View) -> str:
        spec = msgspec.structs.replace(make_spec(), views=views)
        return card_text(spec, [read_commit(made.path, make_spec(), shard) for shard in range(3)])

    both = text("original", "flipped")
    assert "    gkd train-student RECORDS faces.gkd RUN\n\nADDRESS" in both
    assert "gkd RUN --set data.flip=false\n\nIt has targets of the images as" in text("original")
    assert "train-student RECORDS" not in text("flipped")
    assert "It has targets of mirror images alone. `gkd train-student` shows" in text("flipped")


def test_names_are_quoted_for_markdown_and_the_shell(made: Made) -> None:
    spec = msgspec.structs.replace(
        make_spec(),
        teacher=TeacherSpec("a`b\n# c", "onnx", "1" * 64, 128),
        dataset=msgspec.structs.replace(make_spec().dataset, name="my faces; rm *"),
    )
    text = card_text(spec, [read_commit(made.path, make_spec(), shard) for shard in range(3)])
    assert text.startswith("# What `a b # c` says of `my faces; rm *`\n")
    assert "gkd targets pull ADDRESS my-faces--rm--.gkd\n" in text


def test_what_others_wrote_stays_text(made: Made) -> None:
    software = {"gkd": "1.0", "<script>x()</script>": "2\x1b[2J", "zarr": "[a](http://b)"}
    spec = msgspec.structs.replace(make_spec(), software=software)
    commits = [read_commit(made.path, make_spec(), shard) for shard in range(3)]
    text = card_text(spec, commits, note="See\x1b]0;title\x07 **this**.", licence="CC\u202e BY")
    assert "`<script>x()</script>` `2\ufffd[2J`, gkd 1.0, zarr `[a](http://b)`\n" in text
    assert "See\ufffd]0;title\ufffd **this**.\n" in text
    assert "CC\ufffd BY\n" in text
    assert all(char.isprintable() or char == "\n" for char in text)
