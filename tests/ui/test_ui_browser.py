"""The page in a headless browser: a photograph goes in, a mask is painted, a picture is looked at.

With MAGICFACE_RT_SHOTS=DIR the screenshots of docs/ui.md are written there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")

import numpy as np
from paging import SETTINGS, Held, Served, bomb, disc, photograph, png, served
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from magicface_rt.ui.file_names import file_names

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not both installed here"
)

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
SECONDS = 30


@pytest.fixture(scope="module")
def server(session: Held) -> Iterator[Served]:
    with served(session, settings=SETTINGS) as started:
        yield started


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    arguments = (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "no-proxy-server",
        "disable-background-networking",
    )
    for argument in (*arguments, "window-size=1280,900", "force-prefers-reduced-motion"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield started
    started.quit()


class Page:
    """The page in one tab, by what a person sees of it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        self.open()

    def open(self) -> None:
        self.driver.get(f"{self.url}/ui/")
        self.wait(lambda: self.all(".mf-editor") and self.all("#mf-generate"), "the page did not come")

    def wait(self, true: Callable[[], Any], otherwise: str) -> Any:
        return WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: true(), otherwise)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def concept(self, number: int) -> WebElement:
        return self.one(f"#mf-concept-{number}")

    def upload(self, number: int, path: Path) -> None:
        self.concept(number).find_element(By.CSS_SELECTOR, ".mf-photo").send_keys(str(path))
        self.wait(lambda: path.name in self.concept(number).text, "the photograph was not taken")

    def load_mask(self, number: int, path: Path) -> None:
        self.concept(number).find_element(By.CSS_SELECTOR, ".mf-mask").send_keys(str(path))
        self.wait(lambda: "Mask loaded" in self.concept(number).text, "the mask was not taken")

    def canvas(self, number: int) -> WebElement:
        return self.concept(number).find_element(By.CSS_SELECTOR, ".mf-canvas")

    def paint(self, number: int) -> None:
        """A stroke across the middle of the photograph."""
        canvas = self.canvas(number)
        self.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
        wide = canvas.size["width"] // 4
        chain = ActionChains(self.driver, duration=20).move_to_element_with_offset(canvas, -wide, 0).click_and_hold()
        chain.move_by_offset(wide, 5).move_by_offset(wide, -5).release().perform()

    def choose_word(self, number: int, word: str) -> None:
        field = self.concept(number).find_element(By.CSS_SELECTOR, ".mf-word input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(word, Keys.ENTER, Keys.TAB)

    def fill(self, label: str, text: str) -> None:
        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def field(self, label: str) -> WebElement:
        return next(
            one for one in self.all("input[type=number], input[type=text], textarea") if label in one.accessible_name
        )

    def press(self, name: str) -> None:
        button = next(one for one in self.all("button") if one.text == name)
        self.run("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    @property
    def status(self) -> str:
        return self.text("#mf-status")

    def generate(self) -> str:
        """Press the button, wait for the end, and give the picture's data URL."""
        before = self.source
        self.press("Generate")
        self.wait(lambda: "Done in" in self.status and self.source != before, f"no picture came: {self.status}")
        return self.source

    def refused(self, message: str) -> None:
        self.press("Generate")
        self.wait(lambda: message in self.text(".mf-error [role=alert]"), f"not refused: {message}; {self.status}")

    def drawn(self) -> str:
        """The regions as they are drawn."""
        return str(self.run("return document.querySelector('.mf-regions canvas').toDataURL()"))

    def shares_are_right(self, step: int) -> bool:
        """Whether each concept's share of the picture is that of its cells after the step."""
        shown = json.loads(str(self.one(".mf-regions").get_attribute("data-regions")))
        labels = np.frombuffer(base64.b64decode(shown["labels"]), np.uint8).reshape(len(shown["stages"]), -1)[step - 1]
        said = [int(one.text.strip("( %)")) for one in self.all(".mf-share")]
        exact = [100 * float(np.mean(labels == k)) for k in range(1, len(shown["names"]) + 1)]
        return bool(np.allclose(said, exact, rtol=0, atol=0.51))

    @property
    def source(self) -> str:
        found = self.all("#mf-result .mf-picture")
        return str(found[0].get_attribute("src")) if found else ""

    def mask(self, number: int) -> Image.Image:
        """What would be sent."""
        sent = json.loads(self.run("return window.magicface.collect()"))
        data = next(one["mask"] for one in sent if one["slot"] == number)
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("L") if data else Image.new("L", (1, 1))

    def white(self, number: int) -> float:
        mask = self.mask(number)
        return sum(mask.histogram()[128:]) / (mask.width * mask.height)

    def shoot(self, name: str, width: int) -> None:
        """The whole page as a picture, where they are wanted."""
        folder = os.environ.get("MAGICFACE_RT_SHOTS")
        if folder is None:
            return
        height = int(self.run("return document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        colours = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").quantize(256)
        colours.save(Path(folder) / f"{name}.png", optimize=True)


@pytest.fixture
def page(driver: webdriver.Chrome, server: Served) -> Iterator[Page]:
    driver.get_log("browser")  # what came before is another test's
    opened = Page(driver, server.url)
    yield opened
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == [], "the browser complained"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photographs")
    found = {
        "man.png": png(photograph(1, (320, 240))),
        "mask.png": png(disc((320, 240))),
        "narrow.png": png(disc((100, 240))),
        "damaged.png": b"this is no picture",
        "bomb.png": bomb(),
    }
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in found}


def test_drop_a_photograph_paint_a_mask_and_look(page: Page, files: dict[str, Path]) -> None:
    page.upload(1, files["man.png"])
    assert page.white(1) == 0
    page.paint(1)
    assert 0.05 < page.white(1) < 0.9
    page.choose_word(1, "man")
    first = page.generate()
    picture = Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2])))
    assert picture.size == (256, 256)
    assert page.all(".mf-timings td")
    assert "Concept(" in page.one("#mf-python").text
    # every step of the regions, by keyboard
    stage, slider = page.one(".mf-stage"), page.one(".mf-step input")
    assert stage.text == "Step 3 of 3, second stage (RBA)"
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert stage.text == "Step 1 of 3, first stage (RSA)"
    assert "man" in page.one(".mf-regions canvas").accessible_name
    assert page.shares_are_right(1)
    slider.send_keys(Keys.END)
    assert page.shares_are_right(3)
    # twice in a row
    page.fill("Seed", "5")
    second = page.generate()
    assert second != first
    page.fill("Seed", "0")
    assert page.generate() == first


def test_a_photograph_is_dropped_and_mask_and_picture_are_saved(page: Page, files: dict[str, Path]) -> None:
    sent = base64.b64encode(files["man.png"].read_bytes()).decode()
    page.run(
        """const [editor, sent] = arguments;
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(sent), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], 'dropped "by" Jürgen; (1).PNG', { type: "image/png" }));
        editor.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));""",
        page.concept(1).find_element(By.CSS_SELECTOR, ".mf-editor p"),
        sent,
    )
    page.wait(lambda: "Jürgen; (1).PNG is loaded" in page.concept(1).text, "what was dropped was not taken")
    (collected,) = json.loads(page.run("return window.magicface.collect()"))
    assert collected["image"] == sent
    page.paint(1)
    page.run(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () {"
        " window.saved.push([this.href, this.download]); };"
    )
    page.press("Save mask")
    page.choose_word(1, "man")
    source = page.generate()
    page.one(".mf-download").click()
    (mask, mask_name), (picture, picture_name) = page.run("return window.saved")
    assert mask_name == "dropped -by- Jürgen; (1)-mask.png"
    call = page.text("#mf-python")
    assert repr(mask_name) in call, "it names another file than was saved"
    assert repr('dropped "by" Jürgen; (1).PNG') in call
    saved = Image.open(io.BytesIO(base64.b64decode(mask.partition(",")[2]))).convert("L")
    assert saved.tobytes() == page.mask(1).tobytes()
    assert 0 < page.white(1) < 1
    assert (picture, picture_name) == (source, "magicface-0.png")


@pytest.mark.parametrize(("kind", "holder"), [("Image", "HTMLElement"), ("FileReader", "FileReader")])
def test_of_two_photographs_that_are_chosen_at_once_the_last_is_shown(
    page: Page, tmp_path: Path, kind: str, holder: str
) -> None:
    """The first takes longer to decode, or to read: it may not come back over the second."""
    wide, tall = tmp_path / "wide.png", tmp_path / "tall.png"
    Image.new("RGB", (400, 200), "red").save(wide)
    Image.new("RGB", (200, 400), "blue").save(tall)
    page.run(
        """
        const [kind, holder] = [window[arguments[0]].prototype, window[arguments[1]].prototype];
        const real = Object.getOwnPropertyDescriptor(holder, "onload");
        let first = true;
        window.late = 0;
        Object.defineProperty(kind, "onload", {
          configurable: true,
          set(loaded) {
            const slow = first;
            first = false;
            real.set.call(this, slow ? () => setTimeout(() => { loaded(); window.late = 1; }, 1500) : loaded);
          },
        });
    """,
        kind,
        holder,
    )
    page.concept(1).find_element(By.CSS_SELECTOR, ".mf-photo").send_keys(str(wide))
    page.upload(1, tall)
    page.wait(lambda: page.run("return window.late"), "the first photograph was not decoded")
    canvas = page.canvas(1)
    assert canvas.get_attribute("height") == str(2 * int(canvas.get_attribute("width") or 0))
    assert tall.name in page.concept(1).text


NAMED = (
    *(
        "man.JPG",
        "MAN.png",
        "out.png",
        "фото (1).jpg",
        ".a.png",
        "-b.JPG",
        "x/y.png",
        "",
        "photograph",
        'q"?".png',
        "?.png",
    ),
    *("é" * 110 + ".jpg", "two\nlines.jpg", "a\u202eb.jpg", " c.png", "d\u202fe.png", "man-2.png", "\U0001f600.png"),
)


def test_the_script_names_files_as_the_calls_do(page: Page) -> None:
    made = page.run(
        """
        return (async (names) => {
          const made = [];
          for (const name of names) {
            await window.magicface.load(JSON.stringify([{ slot: 1, image: "eA==", mask: null, name }]));
            made.push(JSON.parse(window.magicface.collect())[0].name);
          }
          return made;
        })(arguments[0]);
        """,
        NAMED,
    )
    assert made == [file_names([(1, name)])[0][0] for name in NAMED]


def test_a_painted_mask_of_a_photograph_that_is_turned_upright_fits(page: Page, tmp_path: Path) -> None:
    stored = photograph(1, (240, 240))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stored.save(tmp_path / "turned.jpg", exif=exif)
    disc((240, 240)).save(tmp_path / "mask.png")
    page.upload(1, tmp_path / "turned.jpg")
    page.paint(1)
    page.choose_word(1, "man")
    page.generate()
    assert "turned upright" not in page.status
    page.load_mask(1, tmp_path / "mask.png")
    page.fill("Seed", "5")
    page.generate()
    assert "turned upright" in page.status, "nobody knows what a file was made for"


def test_errors_are_the_sdks_and_the_page_goes_on(page: Page, files: dict[str, Path]) -> None:
    page.choose_word(1, "man")
    page.refused("Concept 1, photograph: the image is empty")
    page.upload(1, files["damaged.png"])
    assert "This browser cannot show the file" in page.concept(1).text
    page.refused("Concept 1, photograph: the image cannot be read")
    page.upload(1, files["bomb.png"])
    page.refused("the image has more than the 16,000,000 pixels that are taken")
    page.upload(1, files["man.png"])
    page.refused("the mask is empty")
    page.load_mask(1, files["narrow.png"])
    page.refused("the aspect ratios differ")
    page.load_mask(1, files["mask.png"])
    page.choose_word(1, "cat")
    page.refused("the word 'cat' is not in the prompt")
    page.choose_word(1, "man")
    page.generate()


def test_a_mask_can_be_painted_with_keys(page: Page, files: dict[str, Path]) -> None:
    page.upload(1, files["man.png"])
    canvas = page.canvas(1)
    page.run("arguments[0].focus()", canvas)
    canvas.send_keys(Keys.ARROW_LEFT, " ")
    one = page.white(1)
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ")
    two = page.white(1)
    assert 0 < one < two
    canvas.send_keys("z")
    assert page.white(1) == one
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, "e", " ")
    assert page.white(1) == 0
    page.press("Paint all")
    assert page.white(1) == 1
    page.press("Clear")
    assert page.white(1) == 0


def test_concepts_come_and_go(page: Page, files: dict[str, Path]) -> None:
    page.upload(1, files["man.png"])
    page.press("Add a concept (up to 6)")
    page.wait(lambda: page.all("#mf-concept-2 .mf-editor"), "no concept was added")
    page.wait(
        lambda: page.run("return document.activeElement.closest('#mf-concept-2') !== null"), "it did not get the focus"
    )
    page.upload(2, files["man.png"])
    page.press("Remove concept 1")
    page.wait(lambda: not page.all("#mf-concept-1 .mf-editor"), "it was not removed")
    assert [one["slot"] for one in json.loads(page.run("return window.magicface.collect()"))] == [2]
    page.press("Add a concept (up to 6)")
    page.wait(lambda: page.all("#mf-concept-1 .mf-editor"), "it did not come back")
    assert "is loaded" not in page.concept(1).text, "the photograph that was removed came back"


def test_examples_work_and_nothing_comes_from_elsewhere(page: Page, driver: webdriver.Chrome, server: Served) -> None:
    page.press("Load: one concept")
    page.wait(lambda: "Loaded the example" in page.status and page.white(1) > 0, "it was not loaded")
    page.generate()
    page.shoot("ui-desktop", 1280)
    page.press("Load: two concepts")
    page.wait(lambda: page.all("#mf-concept-2 .mf-editor") and page.white(2) > 0, "it was not loaded")
    page.generate()
    assert page.one(".mf-legend").text.startswith("1 woman")
    last = page.drawn()
    page.one(".mf-step input").send_keys(Keys.HOME)
    assert page.drawn() != last, "the slider changes nothing"
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith((server.url, "data:", "blob:"))] == []


def test_cancel_and_another_tab(page: Page, driver: webdriver.Chrome, server: Served, session: Held) -> None:
    session.free.clear()
    before = session.steps
    page.press("Generate")
    page.wait(lambda: session.steps > before, "no step was reached")
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    other = Page(driver, server.url)
    assert other.source == ""
    other.press("Cancel")
    other.wait(lambda: "nothing to cancel" in other.status, "it could cancel another tab's request")
    driver.close()
    driver.switch_to.window(first)
    page.press("Cancel")
    page.wait(lambda: "Cancelled" in page.status, "it was not cancelled")
    session.free.set()
    page.wait(lambda: server.service.engine.running == 0, "it goes on")
    assert session.steps == before + 1
    page.generate()


def test_every_control_has_a_name(page: Page, files: dict[str, Path]) -> None:
    page.upload(1, files["man.png"])
    controls = [one for one in page.all("button, input, textarea, select, canvas[tabindex]") if one.is_displayed()]
    assert len(controls) > 25
    nameless = [one.get_attribute("outerHTML") for one in controls if not one.accessible_name.strip()]
    # Gradio measures its tabs' names with buttons that nobody reaches.
    assert [html[:120] for html in nameless if html and 'tabindex="-1"' not in html] == []


def test_it_can_be_used_on_a_phone(page: Page, driver: webdriver.Chrome, files: dict[str, Path]) -> None:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        page.open()
        page.press("Load: one concept")
        page.wait(lambda: page.white(1) > 0, "the example was not loaded")
        page.generate()
        assert page.run("return document.documentElement.scrollWidth") <= PHONE["width"], "it must be scrolled sideways"
        low = [
            one.text or one.get_attribute("class")
            for one in page.all(".mf-tools button, .mf-file, #mf-generate, #mf-cancel")
            if one.is_displayed() and one.size["height"] < 32
        ]
        assert low == [], "too small for a finger"
        page.shoot("ui-phone", PHONE["width"])
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
