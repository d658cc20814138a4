"""The page as a rater meets it, in a headless Chromium; skipped where there is none."""

import json
import random
import shutil
import time

import pytest

from strop.engine.study.balance import SENTINEL
from strop.engine.user_study import main

NAMES = ("zebra", "quokka")
RATERS = ("anna", "ben", "cleo")
TRUTH = {  # question: chance of a reflex to the left, of a tie and of zebra where one looks
    "general": (0.4, 0.1, 0.8),
    "appeal": (0.0, 0.2, 0.5),
    "alignment": (0.0, 0.3, 0.25),
}
ARROWS = {"left": "ArrowLeft", "tie": "ArrowDown", "right": "ArrowRight"}
READY = "ready || !document.getElementById('end').hidden"
PRESSED = "[...document.querySelectorAll('[aria-pressed=true]')].map((button) => button.textContent)"


@pytest.fixture(scope="module")
def study(new_study, tmp_path_factory):
    """(folder, key) of a study of two systems whose limit of haste is 20 ms. Not to be written to."""
    folder = tmp_path_factory.mktemp("browser")
    return folder, new_study(folder, NAMES, 40, "--raters", *RATERS, "--seed", 5, "--repeats", 0.1, "--too-fast", 0.02)


def begin(tab, page, rater):
    tab.open(page / "index.html")
    tab.js(f"document.getElementById('rater').value = {rater!r}; showSaved()")
    tab.click("begin")
    tab.wait(READY)


def position(tab):
    return tab.js("document.getElementById('count').textContent")


def answer_as(tab, key, rater, draws):
    """Answers every pair, by keys, from what is seen: the files of the two images. Returns the sides."""
    pressed = []
    places = {file: place for (_, place), file in key.images.items()}
    while tab.js("document.getElementById('end').hidden"):
        seen = tab.js("['left', 'right'].map((side) => document.getElementById(side).src.split('/').pop())")
        left, right = (places[file] for file in seen)
        pressed.append({})
        for question, (haste, tie, zebra) in TRUTH.items():
            if min(left, right) < 0:
                side = "left" if left >= 0 else "right"
            elif draws.random() < haste:
                side = "left"
            elif draws.random() < tie:
                side = "tie"
            else:
                side = "left" if (left == 0) == (draws.random() < zebra) else "right"
            tab.press(ARROWS[side])
            pressed[-1][question] = side
        tab.press("Enter")
        tab.wait(READY)
    return pressed


def saved(tab, button, folder):
    folder.mkdir(exist_ok=True)
    tab.downloads_to(folder)
    before = set(folder.glob("*.json"))
    tab.click(button)
    end = time.monotonic() + 20
    while not (new := set(folder.glob("*.json")) - before):
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.01)
    return new.pop()


def test_keys_answer_and_the_next_pair_waits_for_all_three(browser, study):
    folder, _ = study
    begin(browser, folder / "study" / "page", "anna")
    assert position(browser) == "pair 1 of 46"
    browser.press("ArrowLeft")
    browser.press("ArrowDown")
    browser.press("Enter")
    assert position(browser) == "pair 1 of 46"
    browser.press("ArrowRight")
    assert browser.js(PRESSED) == ["Left", "No difference", "Right"]
    browser.press("2")
    browser.press("ArrowRight")
    assert browser.js(PRESSED) == ["Left", "Right", "Right"]
    browser.press("Enter")
    browser.wait(READY)
    assert position(browser) == "pair 2 of 46"
    assert browser.js(PRESSED) == []
    browser.press("Backspace")
    browser.wait(READY)
    assert (position(browser), browser.js(PRESSED)) == ("pair 1 of 46", ["Left", "Right", "Right"])
    hint = browser.js("document.querySelector('.hint').innerText")
    assert all(word in hint for word in ("left", "right", "no difference", "Enter", "Backspace", "zoom"))
    assert browser.errors == []


def test_both_images_have_one_size_and_zoom_in_step(browser, study):
    folder, _ = study
    begin(browser, folder / "study" / "page", "anna")
    boxes = "[...document.querySelectorAll('.stage')].map((s) => s.getBoundingClientRect())"
    left, right = browser.js(f"{boxes}.map((box) => [box.width, box.height])")
    assert left == right
    assert left[0] / left[1] == pytest.approx(32 / 24, rel=0.02)
    shifts = "['left', 'right'].map((side) => document.getElementById(side).style.transform)"
    x, y = browser.js(f"(({{x, y, width, height}}) => [x + width / 4, y + height / 2])({boxes}[1])")
    mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", deltaX=0, deltaY=-300, **mouse)
    browser.wait("zoom.scale > 2")
    zoomed = browser.js(shifts)
    browser.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **mouse | {"x": x + 9, "buttons": 1})
    browser.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
    dragged = browser.js(shifts)
    assert zoomed[0] == zoomed[1] != dragged[0] == dragged[1]
    browser.press("0")
    assert browser.js("zoom") == {"scale": 1, "x": 0, "y": 0}


def test_a_reload_goes_on_where_it_was(browser, study):
    folder, _ = study
    begin(browser, folder / "study" / "page", "ben")
    for key in (*3 * ["ArrowLeft"], "Enter"):
        browser.press(key)
    browser.wait(READY)
    for key in (*3 * ["ArrowDown"], "Enter"):
        browser.press(key)
    browser.wait(READY)
    browser.press("ArrowRight")
    browser.reload()
    assert browser.js("document.getElementById('rater').value") == "ben"
    assert "2 of 46" in browser.js("document.getElementById('saved').textContent")
    browser.click("begin")
    browser.wait(READY)
    assert (position(browser), browser.js(PRESSED)) == ("pair 3 of 46", ["Right"])


def test_nothing_counts_before_both_images_are_there(browser, study, tmp_path):
    folder, key = study
    page = shutil.copytree(folder / "study" / "page", tmp_path / "page")
    first = next(iter(key.items["cleo"].values()))
    (page / "images" / key.images[first.prompt, max(first.left, first.right)]).unlink()
    browser.open(page / "index.html")
    browser.js("document.getElementById('rater').value = 'cleo'; showSaved()")
    browser.click("begin")
    browser.wait("document.getElementById('notice').textContent.includes('could not be loaded')")
    browser.press("ArrowLeft")
    assert browser.js(PRESSED) == []
    assert browser.js("[...document.querySelectorAll('.choices button')].every((button) => button.disabled)")


def test_three_raters_from_the_page_to_the_analysis(browser, study, new_study, tmp_path, capsys):
    folder, key = study
    page, files = folder / "study" / "page", []
    for rater in RATERS:
        begin(browser, page, rater)
        browser.js("state = { started: state.started, position: 0, answers: {} }; showPair()")
        browser.wait(READY)
        pressed = answer_as(browser, key, rater, random.Random(rater))
        files.append(saved(browser, "export", tmp_path / "saved"))
        assert [answer["answers"] for answer in json.loads(files[-1].read_text())["answers"]] == pressed
    assert browser.errors == []
    content = json.loads(files[0].read_text())
    assert (content["manifest"], content["rater"], content["complete"]) == (key.manifest, "anna", True)
    assert [answer["id"] for answer in content["answers"]] == list(key.items["anna"])
    assert all(answer["ms"] > 0 and answer["at"].endswith("Z") for answer in content["answers"])
    assert all(answer["too_fast"] == (answer["ms"] < 20) for answer in content["answers"])
    arguments = ["analyse", str(folder / "study" / "key.json"), *map(str, files)]
    main([*arguments, "--out", str(tmp_path / "analysis.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "analysis.json").read_text())
    for question, (haste, tie, zebra) in TRUTH.items():
        truth = haste / 2 + (1 - haste) * (tie / 2 + (1 - tie) * zebra)
        row = result["pairs"][0]["questions"][question]
        assert row["answers"] == 120
        assert row["ci95"][0] < truth < row["ci95"][1]
    sentinels = sum(item.kind == SENTINEL for items in key.items.values() for item in items.values())
    assert result["all_raters"]["sentinels"] == {"passed": sentinels, "of": sentinels}
    left = result["all_raters"]["left"]
    assert left["general"]["p"] < 0.01 < left["appeal"]["p"]
    assert "The left image was favoured, general preference" in printed
    new_study(tmp_path, NAMES, 40, "--raters", *RATERS, "--seed", 6)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", str(tmp_path / "study" / "key.json"), *map(str, files)])
    assert stopped.value.code == 2
    assert f"{files[0]} is of another study" in capsys.readouterr().err
