"""The routing explorer in a browser: what a click, a key and the legend do, against --json."""

import json

import pytest
import torch
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys

from common.printable import in_lines
from helpers_commands import ROOT, command
from helpers_models import write_adapters
from model import load_llama
from pictures.page import Shown, html_page
from pictures.page_weights import heaviest

pytestmark = pytest.mark.browser

EVIL = "</script><b>x"
PROMPT = "the fox</script><b>jumps</b> {{ 7 * 7 }} &quot; \u2028 end"
# A PNG's base64 -> [how many colours it has, its mean brightness of 0 to 255].
LOOK = """
const [png, done] = arguments, image = new Image();
image.onload = () => {
  const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
  canvas.drawImage(image, 0, 0);
  const bytes = canvas.getImageData(0, 0, image.width, image.height).data;
  const greens = bytes.filter((_, j) => j % 4 === 1);
  done([new Set(new Uint32Array(bytes.buffer)).size, greens.reduce((a, b) => a + b, 0) / greens.length]);
};
image.src = "data:image/png;base64," + png;
"""
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
FLAGS += ["--window-size=1280,900"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def write_page(folder, *args):
    """(The page's file, the objects of --json) of a command."""
    page = folder / "page.html"
    done = command("generate.py", *args, "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    return page, [json.loads(line) for line in done.stdout.split("\n")[:-1]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny/ with gates beside a fixed mixture and the base."""
    args = ["--prompt", "Sort the words: river, apple, dog", "--prompt", "What is the plural of mouse?"]
    args += ["--prompt", "Translate into German: house", "--model", ROOT / "tiny"]
    args += ["--method", "meteora", "--method", "mix:plural=0.7,german=0.5", "--method", "base"]
    return write_page(tmp_path_factory.mktemp("tiny"), *args)


@pytest.fixture
def opened(browser, tiny):
    """(The browser at tiny's page, its tokens, the tokens of --json)."""
    page, lines = tiny
    browser.get(page.as_uri())
    yield browser, tokens(browser), [t for line in lines for t in line["prompt_tokens"] + line["tokens"]]
    assert browser.get_log("browser") == []  # no error, nothing that the page failed to load


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def tokens(browser):
    return find(browser, ".tokens > span")


def read_panel(browser):
    """[[adapter, weight], ...] as the panel shows them, those that are folded away too."""
    rows = "return [...document.querySelectorAll('#panel li')].map((li) => [...li.children]"
    rows += ".map((part) => part.textContent))"
    return [[name, float(weight)] for _, name, _, weight in browser.execute_script(rows)]


def press(browser, *keys):
    """Keys for the focused element."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def test_a_click_shows_the_numbers_of_json(opened):
    """Without it the page and --json tell two stories of one token."""
    browser, found, want = opened
    assert len(found) == len(want)
    for place in (0, 9, len(want) // 2, len(want) - 1):
        found[place].click()
        assert read_panel(browser) == want[place]["adapters"]
        assert found[place].get_attribute("aria-current") == "true"
    assert "No adapter weighs above zero" in find(browser, "#panel")[0].text  # the base's token
    assert want[9]["adapters"] and want[len(want) // 2]["adapters"]


def test_hovering_shows_a_token(opened):
    """Without it one has to click through all tokens to see where routing changes."""
    browser, found, want = opened
    for place in (5, 12):
        ActionChains(browser).move_to_element(found[place]).perform()
        assert read_panel(browser) == want[place]["adapters"] != []
    assert not find(browser, "#map td")


def test_arrow_keys_step_through_the_tokens(opened):
    """Without it the page is closed to those who use no mouse."""
    browser, found, want = opened
    press(browser, *[Keys.TAB] * (1 + len(find(browser, "#legend button"))))
    assert browser.switch_to.active_element == found[0]  # one stop of Tab for all tokens
    for keys, place in (
        ([Keys.RIGHT] * 3, 3), ([Keys.LEFT], 2), ([Keys.END], len(found) - 1), ([Keys.RIGHT], len(found) - 1),
        ([Keys.HOME], 0), ([Keys.LEFT], 0),
    ):  # fmt: skip
        press(browser, *keys)
        assert browser.switch_to.active_element == found[place]
        assert read_panel(browser) == want[place]["adapters"]
        assert [t for t in found if t.get_attribute("tabindex") == "0"] == [found[place]]
    press(browser, Keys.DOWN)
    first = browser.execute_script("return document.querySelectorAll('.tokens')[1].firstChild")
    assert browser.switch_to.active_element == first
    press(browser, Keys.UP)
    assert browser.switch_to.active_element == found[0]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"


def test_enter_opens_a_heat_map(opened):
    """Without it what the average hides, a layer that goes elsewhere, stays hidden."""
    browser, found, want = opened
    found[9].click()
    rows = [[cell.text for cell in find(row, "td")] for row in find(browser, "#map tr")[1:]]
    assert len(rows) == 4 and all(len(row) == 7 for row in rows)
    heads = [head.text for head in find(browser, "#map th")]
    assert heads == ["layer", "q", "k", "v", "o", "gate", "up", "down", "0", "1", "2", "3"]
    title = find(browser, "#map td button")[0].get_attribute("title")
    assert title.startswith("layer 0, q: ") and rows[0][0] in title
    total = {}
    for cell in find(browser, "#map td button"):
        for pair in cell.get_attribute("title").partition(": ")[2].split(", "):
            name, weight = pair.rsplit(" ", 1)
            total[name] = total.get(name, 0) + float(weight) / 28
    for name, weight in want[9]["adapters"]:
        assert total.get(name, 0) == pytest.approx(weight, abs=0.01)
    press(browser, Keys.TAB, Keys.RIGHT, Keys.DOWN)
    assert browser.switch_to.active_element == find(browser, "#map td button")[8]
    assert find(browser, "#map .note")[0].text.startswith("layer 1, k: ")
    press(browser, Keys.ESCAPE)
    assert browser.switch_to.active_element == found[9] and not find(browser, "#map")[0].is_displayed()
    press(browser, Keys.RIGHT, Keys.ENTER)
    assert find(browser, "#map")[0].is_displayed()
    press(browser, Keys.END)  # the base's
    assert {cell.text for cell in find(browser, "#map td")} == {"–"}


def test_the_legend_filters(opened):
    """Without it nobody finds the tokens of one adapter among two thousand."""
    browser, found, want = opened
    leads = [max(token["adapters"], key=lambda pair: pair[1], default=[""])[0] for token in want]

    def faded():
        return browser.execute_script(
            "return [...document.querySelectorAll('.tokens > span')].map((t) => getComputedStyle(t).opacity < 1)"
        )

    first, second = find(browser, "#legend button")[:2]
    names = [button.text.split()[1] for button in (first, second)]
    assert not any(faded())
    first.click()
    assert faded() == [name != names[0] for name in leads] and names[0] in leads
    assert first.get_attribute("aria-pressed") == "true"
    press(browser, Keys.TAB, " ")
    assert faded() == [name not in names for name in leads]
    first.click()
    second.click()
    assert not any(faded()) and first.get_attribute("aria-pressed") == "false"


def test_a_screenshot_in_light_and_dark(opened):
    """Without it a page that is blank, or black on black, passes."""
    browser, found, _ = opened
    found[9].click()
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        seen[scheme] = browser.execute_async_script(LOOK, browser.get_screenshot_as_base64())
    assert all(colours > 50 for colours, _ in seen.values())
    assert seen["light"][1] > 200 and seen["dark"][1] < 60


def test_evil_names_stay_text(browser, small_model, tmp_path):
    """Without it an adapter or a prompt from elsewhere runs as a script in the reader's browser."""
    folder = write_adapters(tmp_path, load_llama(small_model), ["one"])["one"]
    args = ["--model", small_model, "--adapter", f"{EVIL}={folder}", "--prompt", PROMPT, "--raw"]
    page, [line] = write_page(tmp_path, *args, "--method", f"adapter:{EVIL}", "--max_new_tokens", 5)
    browser.get(page.as_uri())
    shown = "return [...document.querySelectorAll('.tokens')].map((part) => part.textContent)"
    texts = ["".join(t["text"] for t in line["prompt_tokens"]), line["text"]]
    assert browser.execute_script(shown) == list(map(in_lines, texts))  # hidden characters are escaped
    assert in_lines(PROMPT) in browser.execute_script(shown)[0]
    tokens(browser)[1].click()
    assert read_panel(browser) == [[EVIL, 1.0]]
    assert find(browser, ".method")[0].text == f"adapter:{EVIL}"
    assert find(browser, "#legend button")[0].text.split("■ ")[1].startswith(EVIL)
    assert len(find(browser, "b")) == 1 and len(find(browser, "script")) == 2  # the page's own
    assert "nothing was chosen token by token" in find(browser, "article")[0].text
    assert browser.get_log("browser") == []


def test_slots_of_two_bytes(browser, tmp_path):
    """Without it the heat map of a pool of more than 256 adapters names the wrong ones."""
    weights = torch.zeros(3, 2, 601)
    slots = [[[600, 255], [256, 0]], [[257, 3], [511, 512]], [[5, 599], [1, 300]]]
    weights.scatter_(-1, torch.tensor(slots), torch.tensor([0.8, 0.2]).expand(3, 2, 2))
    token = {"text": "a", "adapters": [["adapter 600", 0.5]]}
    answer = {"method": "soft", "prompt_tokens": [token], "tokens": [token]}
    paths = [f"model.layers.0.self_attn.{module}_proj" for module in "qkv"]
    names = [f"adapter {slot}" for slot in range(601)]
    page = tmp_path / "page.html"
    page.write_text(html_page([Shown(answer, "", heaviest(weights))], names, paths, {}), "utf-8")
    browser.get(page.as_uri())
    for place in (0, 1):
        tokens(browser)[place].click()
        titles = [cell.get_attribute("title") for cell in find(browser, "#map td button")]
        assert titles == [
            f"layer 0, {module}: adapter {first} 0.80, adapter {second} 0.20"
            for module, (first, second) in zip("qkv", [pairs[place] for pairs in slots], strict=True)
        ]
