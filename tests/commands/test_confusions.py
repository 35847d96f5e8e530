"""`gkd targets confusions` and its page in a real browser."""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from gkd.pipeline.settings import CacheSettings, PartitionSettings
from gkd.storage.records.images import digest
from gkd.storage.records.open import open_records
from tests.caches import make_cache
from tests.commands.running import gkd
from tests.pipeline.faces import make, write_folder

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
IDENTITIES, IMAGES = 16, 6
SETTINGS = CacheSettings(
    partition=PartitionSettings(group_temperature=4.0, threshold=1.0, max_group=IDENTITIES),
    shard_samples=40,
)
# Together with the file's name, the key is a complete element.
HOSTILE = ["<script>window.broken = 1<", "<img src=x onerror=window.broken=1>", "'\">&lt;<b>"]


def confusions(*arguments: object) -> dict[str, Any]:
    result = gkd("targets", "confusions", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = self.faces = ""
        self._inside = {"script": "", "style": ""}
        self._open: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            if self.tags[-1][1].get("id") == "faces":
                self.faces += data
        else:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces, some under the wrong person, some persons with hostile names, and their cache."""
    folder = tmp_path_factory.mktemp("made")
    faces = write_folder(folder / "faces", IDENTITIES, IMAGES)
    for number in range(8):
        one, other = faces / f"id{number}/0.png", faces / f"id{(number + 1) % 8}/1.png"
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    for number, name in enumerate(HOSTILE):
        (faces / f"id{number}").rename(faces / name)
        (faces / name / "0.png").rename(faces / name / "script>.png")
    make(faces, folder / "c.gkd", class_mean=True, settings=SETTINGS)
    return folder


@pytest.fixture(scope="module")
def written(made: Path) -> Path:
    confusions(
        made / "c.gkd", "--records", made / "faces", "--out", made / "out", "--max-items", "25"
    )
    return made / "out"


def test_tables_and_page_are_written(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    found = confusions(made / "c.gkd", "--records", made / "faces", "--out", out)
    names = ["confusions.html", "hard.parquet", "identities.parquet", "label_noise.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in ("identities", "label_noise", "hard"):
        assert pq.read_table(out / f"{name}.parquet").num_rows == found[name]
    assert found["label_noise"] >= 8
    assert (found["samples"], found["skipped"]) == (IDENTITIES * IMAGES, 0)
    assert found["faces_missing"] == 0
    assert found["page"] == str(out / "confusions.html")
    records = open_records(made / "faces")
    for item in pq.read_table(out / "label_noise.parquet").to_pylist():
        assert records.key(item["row"]) == item["key"]
        assert records.labels[item["row"]] == item["label"]
        assert digest(records.encoded(item["row"])) == item["digest"]
    words = gkd("targets", "confusions", made / "c.gkd", "--out", out)
    assert words.exit_code == 0
    assert "label noise" in words.stdout
    assert "No faces: run again with --records RECORDS." in Page(out / "confusions.html").text


def test_the_page_loads_nothing_and_escapes_names(written: Path) -> None:
    page = Page(written / "confusions.html")
    assert [each.get("type") for each in page.named("script")] == ["application/json", None]
    assert not page.named("b")
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "style"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes)
    content = (written / "confusions.html").read_text()
    for outside in ("@import", "url(", "http:", "https:"):
        assert outside not in content
    assert all(each["data-face"] in json.loads(page.faces) for each in page.named("img"))
    assert "<script>window.broken = 1</script>.png" in page.text
    policy = page.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src")


def test_records_of_another_data_set_are_refused(made: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", 3, 2, seed=9)
    result = gkd("targets", "confusions", made / "c.gkd", "--records", other, "--out", tmp_path)
    assert result.exit_code == 1
    assert "give the records that the cache was made from (faces)" in result.stderr
    assert not list(tmp_path.glob("*.parquet"))


def test_an_output_folder_that_cannot_be_written_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = gkd("targets", "confusions", made / "c.gkd", "--out", tmp_path / "file")
    assert (result.exit_code, "got a file; name another" in result.stderr) == (1, True)
    assert (tmp_path / "file").read_text() == "mine"
    result = gkd("targets", "confusions", made / "c.gkd", "--out", made / "c.gkd")
    assert (result.exit_code, "which it would damage" in result.stderr) == (1, True)


def test_skipped_samples_and_missing_faces_are_counted(tmp_path: Path, made: Path) -> None:
    cache = make_cache(tmp_path / "c.gkd", skipped={4: "no image", 60: "no image"})
    assert confusions(cache.path, "--out", tmp_path / "out")["skipped"] == 2
    shutil.copytree(made / "faces", tmp_path / "faces")
    shutil.rmtree(tmp_path / "faces" / "id9")
    arguments = (made / "c.gkd", "--records", tmp_path / "faces", "--out", tmp_path / "few")
    assert 1 <= confusions(*arguments)["faces_missing"] <= IMAGES


# --- in a browser ---------------------------------------------------------------------------------


SEEN = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
DRAWN = """
    const [image, done] = arguments;
    image.decode().then(() => {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      canvas.getContext("2d").drawImage(image, 0, 0);
      done(canvas.toDataURL());
    }, (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium with its driver here; `make browser` installs them as root")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1200,1400",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(DRIVER, log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, written: Path) -> webdriver.Chrome:
    browser.get((written / "confusions.html").as_uri())
    return browser


def seen(browser: webdriver.Chrome) -> list[str]:
    """The search text of the items on the screen."""
    script = f"{SEEN}.map((e) => e.dataset.search)"
    return list(map(str, browser.execute_script(script, "section.list li")))


def counted(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "position").text


def counts(first: int, last: int) -> str:
    return f"{first}\N{EN DASH}{last} of 25"


def complaints(browser: webdriver.Chrome) -> list[str]:
    """Messages on the browser's console since the last call."""
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [str(entry["message"]) for entry in entries]


def press(browser: webdriver.Chrome, key: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


def tab(browser: webdriver.Chrome, number: int) -> None:
    browser.find_elements(By.CSS_SELECTOR, "nav button")[number].click()


def test_no_foreign_script_runs_and_nothing_is_fetched(opened: webdriver.Chrome) -> None:
    for number in range(3):
        tab(opened, number)
        press(opened, Keys.ARROW_RIGHT)
    assert opened.execute_script("return window.broken") is None
    fetched = opened.execute_script(
        "return performance.getEntriesByType('resource').map((each) => each.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert complaints(opened) == []
    # A foreign script would be refused.
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1';"
        "document.body.append(s)"
    )
    assert opened.execute_script("return window.broken") is None
    (refused,) = complaints(opened)
    assert "Content Security Policy" in refused


def test_lists_are_paged_by_buttons_and_arrows(opened: webdriver.Chrome, written: Path) -> None:
    pairs = pq.read_table(written / "identities.parquet").slice(0, 25).to_pylist()
    words = [f"{p['a']} {p['b']} {p['key_a']} {p['key_b']}" for p in pairs]
    assert (seen(opened), counted(opened)) == (words[:10], counts(1, 10))
    assert not opened.find_element(By.ID, "previous").is_enabled()
    opened.find_element(By.ID, "next").click()
    assert (seen(opened), counted(opened)) == (words[10:20], counts(11, 20))
    press(opened, Keys.ARROW_RIGHT)
    press(opened, Keys.ARROW_RIGHT)  # the last page
    assert (seen(opened), counted(opened)) == (words[20:], counts(21, 25))
    assert not opened.find_element(By.ID, "next").is_enabled()
    press(opened, Keys.ARROW_LEFT)
    opened.find_element(By.ID, "previous").click()
    assert seen(opened) == words[:10]
    tab(opened, 1)
    noise = pq.read_table(written / "label_noise.parquet").to_pylist()
    assert [each.split("/")[0] for each in seen(opened)] == [
        item["key"].split("/")[0] for item in noise[:10]
    ]
    press(opened, Keys.ARROW_RIGHT)
    tab(opened, 0)
    tab(opened, 1)
    assert counted(opened).startswith("11\N{EN DASH}")  # each list keeps its position


def test_the_filter_finds_keys_classes_and_digests(opened: webdriver.Chrome, written: Path) -> None:
    tab(opened, 1)
    press(opened, Keys.ARROW_RIGHT)
    noise = pq.read_table(written / "label_noise.parquet").slice(0, 25).to_pylist()
    field = opened.find_element(By.ID, "filter")
    for words, wanted in (
        (noise[3]["digest"].hex(), [noise[3]["key"]]),
        ("WINDOW.BROKEN = 1<", [n["key"] for n in noise if "broken = 1<" in n["key"]]),
        ("no such thing", []),
    ):
        field.clear()
        field.send_keys(words)
        assert wanted[:10] == [each.rsplit(" ", 4)[0] for each in seen(opened)]
        assert counted(opened).endswith(f"of {len(wanted)}" if wanted else "none")
    assert "No items." in opened.find_element(By.ID, "noise").text
    field.clear()
    field.send_keys("x", Keys.BACKSPACE, "a", Keys.ARROW_LEFT, "b")  # the arrow moves the cursor
    assert field.get_attribute("value") == "ba"


def test_faces_are_those_of_the_records(opened: webdriver.Chrome, made: Path) -> None:
    records = open_records(made / "faces")
    for number in range(2):
        tab(opened, number)
        faces = opened.execute_script(SEEN, "section.list img")
        assert len(faces) >= 40
        for image in faces[:3]:
            url = opened.execute_async_script(DRAWN, image)
            drawn = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            stored = records.image(int(image.get_attribute("data-face")))
            assert drawn.size == (112, 112)
            # The page has a JPEG, the records a PNG.
            assert np.abs(np.asarray(drawn.convert("RGB"), float) - stored).mean() < 6
    hidden = opened.find_elements(By.CSS_SELECTOR, "#identities img[src]")
    assert hidden == []  # faces of a hidden list are not decoded


def test_colours_follow_the_system(opened: webdriver.Chrome) -> None:
    papers = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        body = opened.find_element(By.TAG_NAME, "body")
        papers.append(body.value_of_css_property("background-color"))
    assert papers == ["rgba(255, 255, 255, 1)", "rgba(20, 24, 29, 1)"]
