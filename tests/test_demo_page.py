"""The demo's page in a real browser, and its server under load and under attack: -m browser.

It needs Debian's chromium and chromium-driver, and the extras `demo` and `browser`. From the
clone's root, `PYTHONPATH=. python tests/test_demo_page.py docs/demo.png` draws the README's page.
"""

import contextlib
import http.client
import json
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_runs import Server, data_url, pictures_of, pixels_of, save_digits_run
from PIL import Image

import mdt_jax
from mdt_jax.data import digits
from mdt_jax.parallel import sharding
from mdt_jax.sampling import images, inpainting

pytestmark = pytest.mark.browser

CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1100",
]
# The values of the page's controls as Gradio's API takes them: label, count, sampler, steps,
# guidance (scale, power, from, to), seed.
SEVEN = [7, 1, "ddpm", 50, 2, 0, 0, 1, 3]
MOST = ("--most_steps=1000", "--most_pictures=4")
LONG = [7, 4, "ddpm", 1000, 2, 0, 0, 1, 3]  # some seconds
WAIT = 240


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "run"
    save_digits_run(path)
    return path


@pytest.fixture(scope="module")
def loaded(workdir):
    mesh = sharding.create_mesh(devices=sharding.create_mesh().devices.flat[:1].tolist())
    return mesh, *mdt_jax.load(workdir, mesh=mesh)


@pytest.fixture(scope="module")
def server(workdir, tmp_path_factory):
    server = Server(workdir, tmp_path_factory.mktemp("demo") / "tmp", *MOST)
    yield server
    assert server.stop() == 0, server.lines[-20:]
    assert list(server.folder.iterdir()) == []


@pytest.fixture
def browser(tmp_path, server):
    with open_browser(tmp_path / "profile", server.address) as page:
        yield page


class open_browser:
    """Chromium on a page of its own; on leaving, nothing may have gone wrong in it."""

    def __init__(self, profile, address):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in (*CHROMIUM, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.add_experimental_option(
            "prefs", {"download.default_directory": str(Path(profile).parent)}
        )
        self.driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
        self.address = address
        self.folder = Path(profile).parent
        self.driver.get(address)
        self.wait(lambda: self.tab("Sample"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.driver.quit()

    def wait(self, condition, seconds=WAIT):
        """The condition's value, once it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited for {seconds} s; the page says {self.says()!r}")

    def find(self, css):
        """The elements of a selector that are seen."""
        return [e for e in self.driver.find_elements("css selector", css) if e.is_displayed()]

    def tab(self, name):
        return [e for e in self.find('button[role="tab"]') if e.text == name]

    def open(self, name):
        self.tab(name)[0].click()
        self.wait(lambda: self.tab(name)[0].get_attribute("aria-selected") == "true")

    def control(self, label, kind="input"):
        """The control that is labelled so, as a screen reader finds it."""
        (found,) = [
            e for e in self.find(kind) if (e.accessible_name or "").strip().startswith(label)
        ]
        return found

    def write(self, label, text):
        from selenium.webdriver.common.keys import Keys

        control = self.control(label)
        control.send_keys(Keys.CONTROL, "a")
        control.send_keys(text, Keys.ENTER)

    def press(self, name):
        (button,) = [
            e for e in self.find("button:not([role=tab]):not([tabindex='-1'])") if e.text == name
        ]
        button.click()

    def says(self):
        """The state of the tab that is open."""
        return " ".join(e.text for e in self.find(".mdt-status"))

    def pictures(self):
        """The finished pictures' files."""
        self.wait(lambda: self.says().startswith("Ready. ") and self.find("figcaption"))
        html = "".join(e.get_attribute("outerHTML") for e in self.find(".mdt-pictures"))
        return pictures_of(html)


def seven(loaded, count=1, seed=3):
    """What `mdt_jax.sample` makes of SEVEN."""
    mesh, model, params = loaded
    samples = mdt_jax.sample(
        model, params, labels=["7"] * count, key=seed, mesh=mesh, steps=50, cfg_scale=2.0
    )
    return images.to_uint8(samples)[..., 0]


def choose_seven(page, seed=3):
    page.write("Class", "7")
    page.driver.find_element("css selector", 'input[type="radio"][value="1"]').click()
    page.write("Seed", str(seed))


# The browser.


def test_a_seven_is_sampled_with_the_bits_of_the_command_and_downloaded(browser, loaded):
    assert browser.says() == "Ready."
    choose_seven(browser)
    browser.press("Sample")
    (file,) = browser.pictures()
    np.testing.assert_array_equal(pixels_of(file), seven(loaded)[0])
    (picture,) = browser.find(".mdt-pictures img")
    assert picture.get_attribute("alt").startswith("7, seed 3") and picture.size["width"] > 100
    assert "synthetic" in browser.find("figcaption")[0].text
    browser.find(".mdt-pictures a")[0].click()
    saved = browser.folder / "seed3_0.png"
    browser.wait(saved.exists)
    assert saved.read_bytes() == file
    said = images.read_metadata(saved)
    assert said["Content"].startswith("synthetic") and said["labels"] == "7"


def test_pictures_stream_in_and_cancel_stops_them(browser):
    browser.write("Class", "7")
    browser.write("Steps", "1000")
    browser.press("Sample")
    browser.wait(lambda: browser.find(".mdt-status progress"))
    browser.wait(lambda: browser.find('.mdt-pictures img[alt*="on its way"]'))
    browser.press("Cancel")
    browser.wait(lambda: "cancelled" in browser.says(), seconds=60)
    assert not browser.find("figcaption")
    browser.write("Steps", "50")
    browser.press("Sample")
    assert browser.pictures()


def test_a_brushed_part_is_painted_and_the_rest_stays(browser, loaded, tmp_path):
    scan = digits("heldout")[3]["image"]
    Image.fromarray(scan[..., 0]).save(tmp_path / "scan.png")
    browser.open("Inpaint")
    browser.control("Picture to paint into").send_keys(str(tmp_path / "scan.png"))
    browser.wait(lambda: browser.driver.execute_script("return window.mdtPictures.paint.picture"))
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    (canvas,) = browser.find("canvas.paints")
    size = canvas.size["width"]
    ActionChains(browser.driver).move_to_element_with_offset(
        canvas, -3 * size // 16, -size // 16
    ).click_and_hold().move_by_offset(3 * size // 8, 0).release().perform()
    state = "return window.mdtPictures.paint.mask"
    stroke = browser.wait(lambda: browser.driver.execute_script(state))
    mask = np.array(list(stroke)).reshape(8, 8) == "1"
    assert 3 <= mask.sum() <= 24 and mask[3, 2:6].all()
    canvas.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.SPACE)  # the same by keyboard
    by_key = np.array(list(browser.driver.execute_script(state))).reshape(8, 8) == "1"
    assert by_key.sum() > mask.sum()
    browser.write("Class", "No class")
    browser.press("Inpaint")
    (file,) = browser.pictures()
    painted = pixels_of(file)
    np.testing.assert_array_equal(painted[~by_key], scan[..., 0][~by_key])
    mesh, model, params = loaded
    expected = inpainting.inpaint(
        model, params, inpainting.to_unit_range(scan), by_key, key=0, mesh=mesh, masked_share=0.0,
        sampler="ddpm", steps=50,
    )  # fmt: skip
    np.testing.assert_array_equal(painted, images.to_uint8(expected)[0, ..., 0])


def test_hidden_tokens_are_shown_and_predicted(browser):
    browser.open("Hidden tokens")
    browser.press("Hide and predict")
    files = browser.pictures()
    captions = [e.text for e in browser.find("figcaption")]
    assert len(files) == 4 and "8 of 16 tokens hidden" in captions[1]
    assert ["synthetic" in caption for caption in captions] == [False, False, True, True]


def test_two_browsers_at_once_each_get_their_own_pictures(browser, loaded, server, tmp_path):
    with open_browser(tmp_path / "other", server.address) as other:
        for page, seed in ((browser, 11), (other, 12)):
            choose_seven(page, seed)
            page.press("Sample")
        for page, seed in ((browser, 11), (other, 12)):
            (file,) = page.pictures()
            np.testing.assert_array_equal(pixels_of(file), seven(loaded, seed=seed)[0])


def test_every_control_has_a_name_and_is_reached_by_keyboard(browser):
    named = 0
    for tab in ("Sample", "Inpaint", "Hidden tokens"):
        browser.open(tab)
        for kind in ("input", "button", "select", "textarea", "canvas"):
            for control in browser.find(kind):
                if control.get_attribute("tabindex") == "-1":
                    continue  # copies by which Gradio measures tabs
                assert (control.accessible_name or "").strip(), control.get_attribute("outerHTML")
                named += 1
    assert named > 40


def test_nothing_is_asked_of_other_hosts_and_nothing_fails_in_the_page(browser, server):
    for tab in ("Sample", "Inpaint", "Hidden tokens"):
        browser.open(tab)
    asked = set()
    for entry in browser.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    own = (server.address, "data:", "blob:", "chrome")
    assert len(asked) > 5 and [url for url in asked if not url.startswith(own)] == []
    severe = [e for e in browser.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert severe == []


# The server without a browser.


def test_twenty_requests_of_four_clients_are_all_answered(server, loaded):
    before = server.memory()
    expected = {seed: seven(loaded, seed=seed)[0] for seed in range(4)}

    def client(seed):
        return [(seed, *server.ask("sample", [*SEVEN[:-1], seed])) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for some in pool.map(client, range(4)) for answer in some]
    assert [kind for _, kind, _ in answers] == ["complete"] * 20
    for seed, _, page in answers:
        np.testing.assert_array_equal(pixels_of(pictures_of(page)[0]), expected[seed])
    print(
        f"20 requests: memory {before / 2**20:.0f} MiB before, {server.memory() / 2**20:.0f} after"
    )
    for _ in range(2):  # what a first load allocates, no later one does again
        middle = server.memory()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(client, range(4)))
    print(f"60 requests: {server.memory() / 2**20:.0f} MiB")
    assert server.memory() < middle + 64 * 2**20


def test_beyond_those_that_may_wait_requests_are_told_busy(workdir, tmp_path):
    server = Server(workdir, tmp_path / "tmp", *MOST, "--most_waiting=1")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda seed: server.ask("sample", [*LONG[:-1], seed]), range(6)))
    told = [kind if kind == "complete" else text for kind, text in answers]
    assert sum(text == "complete" for text in told) >= 2
    busy = [text for text in told if "busy" in text]
    assert len(busy) >= 2 and all(text == "complete" or "busy" in text for text in told)
    # SIGTERM while it samples: whoever waits is told why, and it ends in time.
    asked, heard, samples = server.begin("sample", LONG), [], threading.Event()

    def read():
        with contextlib.suppress(ConnectionError, http.client.IncompleteRead):
            for kind, data in server.events("sample", asked):
                heard.append((kind, json.dumps(data)))
                if "Denoising" in heard[-1][1]:
                    samples.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert samples.wait(WAIT)
    began = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0, server.lines[-20:]
    print(f"SIGTERM while sampling: ended after {time.monotonic() - began:.1f} s")
    reader.join(10)
    assert heard[-1][0] == "error" and "the server is stopping" in heard[-1][1], heard[-1]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_client_that_disappears_does_not_hold_the_line(server):
    event = server.begin("sample", LONG)
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(
            f"GET /gradio_api/call/sample/{event} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        )
        gone.recv(100)
    assert server.ask("sample", SEVEN)[0] == "complete"


HOSTILE = [
    ("sample", [10**9, *SEVEN[1:]], "class 1000000000"),
    ("sample", [7, 10**6, *SEVEN[2:]], "number of pictures"),
    ("sample", [7, 1, "ddpm", 10**7, *SEVEN[4:]], "steps"),
    ("sample", [7, 1, "ddpm", 50, "NaN", *SEVEN[5:]], "guidance scale"),
    ("sample", [{"a": [1] * 1000}, *SEVEN[1:]], "class"),
    ("inpaint", [{"picture": "file:///etc/passwd"}, -1, 1, "ddpm", 9, 1, 4, 0, 0], "no data URL"),
    ("inpaint", ["/etc/passwd", -1, 1, "ddpm", 9, 1, 4, 0, 0], "choose one first"),
    ("hidden", [{"path": "/etc/passwd"}, 99, -1, 0.5, 0.5, 0], "picture of the data"),
]


@pytest.mark.parametrize(("name", "values", "said"), HOSTILE)
def test_calls_that_bypass_the_page_get_one_line(server, name, values, said):
    kind, text = server.ask(name, values)
    assert kind == "error" and said in text and "Traceback" not in text, text


def test_malformed_and_oversized_calls_leave_the_server_alive(server):
    lines = len(server.lines)
    body = json.dumps({"data": ["a"] * 50}).encode()
    event = json.loads(server.post("/gradio_api/call/sample", body))["event_id"]
    assert [kind for kind, _ in server.events("sample", event)][-1] == "error"
    for path, body in (
        ("/gradio_api/call/sample", b"{not json"),
        ("/gradio_api/call/nothing", b'{"data": []}'),
        ("/gradio_api/call/sample", b'{"data": ["' + b"a" * 20 * 2**20 + b'"]}'),
        ("/gradio_api/upload", b"{}"),
        ("/gradio_api/queue/join", b'{"data": [NaN], "fn_index": 10000, "session_hash": "a"}'),
    ):
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            server.post(path, body)
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.address + path, timeout=20)
    bad = data_url(b"%PDF-1.7", "PNG")
    assert server.ask("inpaint", [{"picture": bad}, -1, 1, "ddpm", 9, 1, 4, 0, 0])[0] == "error"
    assert server.ask("sample", SEVEN)[0] == "complete"
    said = "\n".join(server.lines[lines:])
    assert "Traceback" not in said, said


def draw_page(output):
    """The README's picture: the page after four sevens were sampled."""
    with tempfile.TemporaryDirectory() as folder:
        save_digits_run(Path(folder) / "run")
        server = Server(Path(folder) / "run", Path(folder) / "tmp")
        with open_browser(Path(folder) / "profile", server.address) as page:
            page.driver.set_window_size(1240, 1130)
            page.write("Class", "7")
            page.write("Seed", "3")
            page.press("Sample")
            page.pictures()
            page.driver.save_screenshot(output)
        server.stop()


if __name__ == "__main__":
    draw_page(sys.argv[1])
