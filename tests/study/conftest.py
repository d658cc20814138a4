"""Small studies, raters who answer as they are told, and a browser.

The browser is a headless Chromium driven through the DevTools protocol over a pipe: no driver and no package is needed.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from strop.engine.study.balance import SENTINEL
from strop.engine.study.key import Key
from strop.engine.user_study import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Backspace": 8}


class Browser:
    """One tab. `with Browser() as tab: tab.open(path); tab.press("Enter"); tab.js("document.title")`."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_child, self.write_to = os.pipe()
        self.read_from, from_child = os.pipe()

        # the child reads at 3 and writes at 4
        shell = f'exec 3<&{to_child} 4>&{from_child}; exec "$@"'
        command = ["bash", "-c", shell, "chromium", CHROMIUM, *FLAGS, "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(to_child, from_child), **quiet)
        os.close(to_child)
        os.close(from_child)
        self.buffer, self.count, self.session, self.errors = b"", 0, None, []
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **params):
        """The result of a command; events on the way are dropped, errors of the page are kept in `errors`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.read_from, 1 << 16)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState === 'complete' && !!document.getElementById('begin')")

    def reload(self):
        self.js("window.old = true")
        self.call("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'")

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.005)

    def click(self, name):
        self.js(f"document.getElementById('{name}').click()")

    def press(self, key):
        """Presses a key as a person does: the page gets it from the browser, not from a script."""
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def downloads_to(self, folder):
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def shown(self, width, height, path):
        """A picture of the page at a size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.js("new Promise((done) => setTimeout(done, 300))")
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    with Browser() as tab:
        yield tab


@pytest.fixture(scope="session")
def draw():
    """draw(folder, names, count): a folder of `count` small images for each system, and their prompts in the first.

    The images carry the name of their system as metadata, as those of some interfaces do.
    """

    def write(folder, names, count):
        for shade, name in enumerate(names):
            (folder / name).mkdir(parents=True)
            for n in range(count):
                image = Image.new("RGB", (32, 24), (80 * shade, 4 * n % 256, 120))
                ImageDraw.Draw(image).ellipse((4, 2, 14 + n % 9, 12), fill=(250, 250 - 40 * shade, 3 * n % 256))
                about = PngImagePlugin.PngInfo()
                about.add_text("parameters", f"drawn by {name}")
                image.save(folder / name / f"{n}.png", pnginfo=about)
        lines = [json.dumps({"file": f"{n}.png", "prompt": f"text <{n}> & more"}) for n in range(count)]
        (folder / names[0] / "prompts.jsonl").write_text("\n".join(lines))
        return [str(folder / name) for name in names]

    return write


@pytest.fixture(scope="session")
def new_study(draw):
    """new_study(folder, names, count, *options) -> its key; the study stands in folder/study."""

    def write(folder, names, count, *options):
        main(["make", *draw(folder, names, count), "--out", str(folder / "study"), *map(str, options)])
        return Key.read(folder / "study" / "key.json")

    return write


@pytest.fixture(scope="session")
def hand_in():
    """hand_in(path, key, rater, answer, **changes): the file of a rater; answer(item, question) is a side.

    Sentinels are answered with the intact image, each pair after five seconds.
    """

    def write(path, key, rater, answer, **changes):
        answers = []
        for item in key.items[rater].values():
            intact = "left" if item.left >= 0 else "right"
            sides = {q: intact if item.kind == SENTINEL else answer(item, q) for q in key.questions}
            answers.append({"id": item.token, "answers": sides, "ms": 5000, "at": "2026-11-25T12:00:00Z"})
        content = {"format": "strop-study-answers/1", "manifest": key.manifest, "rater": rater, "answers": answers}
        path.write_text(json.dumps(content | changes))
        return path

    return write
