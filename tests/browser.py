"""A headless Chromium to click and look at, over its own protocol: JSON over two pipes, no package.

    with Browser(width=390) as browser:
        browser.open(path)
        browser.click("input")
        browser.look("document.title")
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The browser reads commands from descriptor 3 and writes answers to 4.
START = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
         "os.execv(sys.argv[3], sys.argv[3:])")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")


def find():
    """The path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a Chromium.

    complaints: messages of its console, scripts and network that a good page would not cause
    """

    def __init__(self, width, height=844, scheme="light"):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        program = [sys.executable, "-c", START, str(commands), str(answers), find(), *FLAGS,
                   f"--user-data-dir={self.folder.name}"]
        self.process = subprocess.Popen(program, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.buffer = b""
        self.number = 0
        self.session = None
        self.complaints = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        self.folder.cleanup()

    def ask(self, method, **params):
        """The answer to a protocol command; complaints that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.listen(answer)

    def read(self):
        while b"\0" not in self.buffer:
            some = os.read(self.answers, 1 << 16)
            assert some, "the browser has ended"
            self.buffer += some
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def listen(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.complaints.append(f"fetches {url}")
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))

    def look(self, expression):
        """The value of a JavaScript expression in the page, awaited."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path):
        """Load a page and wait until its script says it is ready."""
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.look("""new Promise(done => {
            const wait = () => document.documentElement?.dataset.ready ? done() : setTimeout(wait, 20);
            wait();
        })""")

    def click(self, selector, across=0.5, down=0.5):
        """Press and release the mouse on an element, at a fraction of its width and height."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.look(f"{box}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y, width, height = self.look(
            f"(b => [b.x, b.y, b.width, b.height])({box}.getBoundingClientRect())")
        at = {"x": x + across * width, "y": y + down * height}
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key):
        """Press a key, such as ArrowLeft or Tab."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])
