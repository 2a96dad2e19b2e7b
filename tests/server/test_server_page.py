"""The live page in a headless Chromium, against a real server under load."""

import shutil
import threading
import urllib.request

import pytest
from server_process import ServerProcess, compressing_model
from text_models import byte_level_tokenizer, random_llama

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1180,900", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver here")
def test_page_follows_the_engine(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name):
        return browser.find_element(By.ID, name).text

    with ServerProcess(tmp_path, model=compressing_model(tmp_path / "model")) as server:
        browser.get(f"{server.url}/")
        wait = WebDriverWait(browser, 300, poll_frequency=0.2)
        wait.until(lambda _: text("running") == "0" and text("model") == "tiny")
        assert text("pages") == "0.0 %" and not browser.find_elements(By.CSS_SELECTOR, "td")

        body = b'{"prompt": "def main():", "n": 3, "max_tokens": 300, "ignore_eos": true}'
        request = urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        load = threading.Thread(target=lambda: urllib.request.urlopen(request).read())
        load.start()
        wait.until(lambda _: text("running") == "3")
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#requests tr")) == 3)
        wait.until(lambda _: float(text("speed")) > 0)
        wait.until(lambda _: float(text("pages").removesuffix(" %")) > 0)
        wait.until(lambda _: text("cr") not in ("–", "1.00"))
        browser.save_screenshot(str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000
        load.join()

        wait.until(lambda _: text("running") == "0" and "3 finished" in text("waiting"))
        wait.until(lambda _: text("pages") == "0.0 %")
        live = server.wait_until_idle()
        assert text("cr") == f"{live['measured_cr']:.2f}"
        cells = browser.find_elements(By.CSS_SELECTOR, "#map .cell")
        want = [cr for heads in live["measured_cr_LG"] for cr in heads]
        shown = [float(cell.text) for cell in cells]
        assert shown == pytest.approx(want, abs=0.0501), "browsers round halves up"
        assert len({cell.value_of_css_property("background-color") for cell in cells}) > 5
        # nothing but the server is asked, and nothing fails
        names = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert names and all(name.startswith(server.url) for name in names), names
        wrong = [e for e in browser.get_log("browser") if "favicon" not in e["message"]]
        assert not wrong, wrong

        server.kill()
        wait.until(lambda _: "no answer" in text("error"))


@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver here")
def test_chat_on_the_page(browser, tmp_path):
    """An answer with its speed below, a message that does not fit, and Clear."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    folder = tmp_path / "model"
    byte_level_tokenizer(folder)
    random_llama(folder, 300).float().save_pretrained(folder)

    def lines(role):
        return [line.text for line in browser.find_elements(By.CSS_SELECTOR, f"#log .{role}")]

    with ServerProcess(tmp_path, model=folder) as server:
        browser.get(f"{server.url}/")
        wait = WebDriverWait(browser, 120, poll_frequency=0.1)
        say = browser.find_element(By.ID, "say")
        wait.until(lambda _: say.is_displayed())
        cost = browser.find_element(By.ID, "cost")
        answered = "return answering === null"
        say.send_keys("keys", Keys.ENTER)
        wait.until(lambda _: len(lines("assistant")) == 1 and "tokens/s" in cost.text)
        wait.until(lambda _: browser.execute_script(answered))
        assert lines("user") == ["keys"] and lines("assistant")[0] and not lines("error")
        assert browser.execute_script("return messages.map(m => m.role)") == ["user", "assistant"]
        # this model never ends a text: the answer has filled its context
        say.send_keys("pages", Keys.ENTER)
        wait.until(lambda _: len(lines("error")) == 1 and browser.execute_script(answered))
        assert "256" in lines("error")[0]
        assert browser.execute_script("return messages.length") == 2, (
            "what was refused is not sent again"
        )
        browser.find_element(By.ID, "forget").click()
        assert lines("user") == [] and cost.text == ""
        wrong = [e["message"] for e in browser.get_log("browser") if "favicon" not in e["message"]]
        assert all("400" in message for message in wrong), wrong
