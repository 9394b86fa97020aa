"""The web page in a real browser, on real servers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.browsing import KEYS, Page, show_as
from support.pages import request
from support.service_calls import Caller, ServerProcess, make_config
from touchline_protos.codec import Episode, encode_add_episode
from touchline_server import Config
from touchline_server.service.app import ServerThread

ROWS = 30
LEARNER, ACTOR = "learner-token-012345", "actor-token-01234567"


def episode_of(seed: int, **origin: Any) -> Episode:
    rng = np.random.default_rng(seed)
    columns = {
        "obs.rgb": rng.integers(0, 256, (ROWS, 3, 16, 16), dtype=np.uint8),
        "obs.state": rng.standard_normal((ROWS, 12)).astype(np.float32),
        "action": rng.standard_normal((ROWS, 2)).astype(np.float32),
        "reward": rng.standard_normal(ROWS).astype(np.float32),
    }
    columns["action"][0] = columns["reward"][0] = np.nan
    return Episode(columns, **origin)


def config_of(**sections: dict[str, Any]) -> Config:
    return make_config(**{"http": {"port": 0}, **sections})


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with two tables, 12 episodes of 3 actors, a refused one, and 5 batches delivered."""
    with ServerThread(config_of(tables={"demos": {}}), http=True) as server, Caller(server.address) as caller:
        for number in range(12):
            caller.add(episode_of(number, actor=f"robot-{number % 3}", policy_version=number))
        caller.add(encode_add_episode(episode_of(99, actor="teacher"), table="demos"))
        broken = episode_of(50, actor="robot-1")
        broken.columns["reward"] = broken.columns["reward"][:-1]
        with pytest.raises(Exception, match="reward"):
            caller.add(broken)
        for _ in range(5):
            caller.sample(batch_size=8)
        yield server.http_address


@pytest.fixture
def page(browser: Any, address: str) -> Page:
    page = Page(browser, address)
    page.open()
    return page


# Numbers


def test_numbers_on_the_page_are_the_servers(page: Page, address: str) -> None:
    page.wait(lambda: page.fact("store", "Ever added") == 12, "every episode is shown")

    status = request(address, "/api/status").json
    table = status["tables"][0]
    assert page.fact("tiles", "Fill") == table["counts"]["steps_stored"] == 12 * ROWS
    assert page.fact("store", "Episodes stored") == table["counts"]["episodes_stored"]
    assert page.fact("store", "Columns") == table["size_bytes"]
    assert page.column("episodes", "id", ".link") == [episode["episode_id"] for episode in table["newest"][:12]]
    assert page.column("episodes", "reward_sum") == pytest.approx([episode["reward_sum"] for episode in table["newest"][:12]])
    actors = sorted((one for one in status["actors"] if one["table"] == ""), key=lambda one: one["name"])
    assert page.column("actors", "name") == [one["name"] for one in actors] == ["robot-0", "robot-1", "robot-2"]
    assert page.column("actors", "episodes") == [one["episodes"] for one in actors] == [4, 4, 4]
    assert page.column("actors", "refused") == [one["refused"] for one in actors] == [0, 1, 0]
    total = next(flow for flow in table["flows"] if flow["window_s"] == 0)
    assert page.column("flows", "ratio")[-1] == pytest.approx(total["replay_ratio"])
    assert page.column("learners", "batches") == [5]
    assert page.column("refusals", "count") == [1]
    assert "reward" in page.text("#refusals")


def test_verdict_is_the_servers_sentence(page: Page, address: str) -> None:
    table = request(address, "/api/status").json["tables"][0]

    assert page.find("#verdict").get_attribute("data-verdict") == table["verdict"]
    assert page.text("#verdict-name") in page.browser.title


def test_charts_go_on_with_every_snapshot(page: Page) -> None:
    label = page.wait(lambda: page.find('[aria-label^="Rows stored"]').get_attribute("aria-label"), "the chart has a value")
    points = "return document.querySelector('#charts canvas') ? performance.getEntriesByType('resource').length : 0"

    assert label == "Rows stored: stored 360"
    assert page.run(points) > 0


def test_tables_have_a_page_each(page: Page) -> None:
    page.find('[data-table="demos"]').click()

    page.wait(lambda: page.fact("tiles", "Fill") == ROWS, "the other table is shown")
    assert page.browser.current_url.endswith("?table=demos")
    page.browser.refresh()
    page.wait(lambda: page.fact("tiles", "Fill") == ROWS, "the other table is shown again")


def test_page_fetches_nothing_from_elsewhere(page: Page, address: str) -> None:
    urls = page.run("return [location.href, ...performance.getEntriesByType('resource').map((entry) => entry.name)]")

    assert len(urls) > 10
    assert [url for url in urls if not url.startswith(f"http://{address}/")] == []


# Episodes


def test_episode_is_opened_by_keyboard_and_closed_by_escape(page: Page) -> None:
    page.find('#episodes [data-key="7"] .link').send_keys(KEYS.ENTER)
    page.wait(lambda: page.text("#episode-title") == "Episode 7" and len(page.all("#episode-plots canvas")) == 3, "its columns are plotted")

    titles = [figure.text.split("\n")[0] for figure in page.all("#episode-plots figcaption")]
    assert titles == ["reward float32", "obs.state float32 [12]", "action float32 [2]"]
    page.wait(lambda: page.run("return document.querySelector('.frame').naturalWidth") == 16, "the image is there")
    slider = page.find(".film input")
    slider.send_keys(KEYS.ARROW_RIGHT, KEYS.ARROW_RIGHT)
    assert page.text(".film output") == f"row 2 of {ROWS - 1}"
    assert "row=2" in page.find(".frame").get_attribute("src")
    slider.send_keys(KEYS.ESCAPE)
    assert not page.find("#episode").is_displayed()
    assert page.run("return document.activeElement.textContent") == "7"


def test_further_dimensions_are_shown_on_demand(page: Page) -> None:
    page.find('#episodes [data-key="7"] .link').click()
    button = page.wait(lambda: page.find("#episode-plots .quiet"), "the button is there")
    assert "dimensions 0 to 7 of 12" in button.text

    button.click()

    page.wait(lambda: "dimensions 8 to 11 of 12" in page.text("#episode-plots"), "the others are shown")


def test_filmstrip_plays_to_its_end(page: Page) -> None:
    page.find('#episodes [data-key="7"] .link').click()
    page.wait(lambda: page.all(".film .controls button"), "the film is there")[0].click()

    page.wait(
        lambda: page.text(".film output") == f"row {ROWS - 1} of {ROWS - 1}" and page.text(".film button") == "Play", "the film has ended"
    )


def test_episodes_of_an_actor_are_listed(page: Page) -> None:
    page.find("#episode-actor").send_keys("robot-1", KEYS.ENTER)

    page.wait(lambda: page.column("episodes", "id", ".link") == [10, 7, 4, 1], "only these are listed")


def test_evicted_episode_is_said_to_be(page: Page) -> None:
    page.find('#episodes [data-key="0"] .link').click()
    page.wait(lambda: page.text("#episode-title") == "Episode 0", "it is shown")
    page.find("#episode-older").click()

    page.wait(lambda: "episode -1 is not stored" in page.text("#episode-error"), "the page says so")
    page.browser.get_log("browser")  # the 404 itself


# Many actors, and restarts


def test_thousand_actors_are_a_short_list_and_more_on_demand(browser: Any) -> None:
    with ServerThread(config_of(config={"buffer_size": 40_000, "batch_size": 8, "horizon": 3}), http=True) as server:
        with Caller(server.address) as caller:
            columns = {"obs": np.zeros((5, 2), np.float32), "action": np.zeros((5, 1), np.float32), "reward": np.zeros(5, np.float32)}
            columns["action"][0] = np.nan
            for number in range(1000):
                caller.add(Episode(columns, actor=f"actor-{number}"))
        page = Page(browser, server.http_address)
        page.open()
        page.wait(lambda: page.find("#actors-note").get_attribute("data-value") == "1000", "all are counted")

        assert len(page.all("#actors tbody tr")) == 12
        page.find("#actors tfoot button").click()
        shown = page.all("#actors tbody tr")
        assert len(shown) == 129
        assert shown[-1].text.startswith("872 others")
        assert page.run("return document.querySelectorAll('*').length") < 6000
        assert len(request(server.http_address, "/api/status").body) < 400_000


def test_page_survives_a_restart_of_the_server_and_says_so(browser: Any, tmp_path: Path) -> None:
    environment = {"TOUCHLINE_HTTP__ENABLED": "on", "TOUCHLINE_HTTP__PORT": "0"}
    with ServerProcess(tmp_path, **environment) as server:
        page = Page(browser, server.page_address)
        page.open()
        server.signal(signal.SIGKILL)
        server.wait()
    page.wait(lambda: "Disconnected" in page.text("#connection"), "the loss is shown")

    port = page.address.rpartition(":")[2]
    with ServerProcess(tmp_path, **environment | {"TOUCHLINE_HTTP__PORT": port}) as server:
        assert server.page_address == page.address
        page.wait(lambda: page.text("#connection") == "Live", "the page is connected again")
        page.wait(lambda: "The server was restarted at" in page.text("#notice"), "the restart is shown")
        with Caller(server.address) as caller:
            caller.add(episode_of(0))
        page.wait(lambda: page.fact("tiles", "Fill") == ROWS, "it is live again")


# Who uses it, and how


def test_table_is_sorted_by_keyboard(page: Page) -> None:
    header = page.wait(lambda: page.find("#actors thead th:first-child button"), "the table is there")
    assert page.find("#actors thead th").get_attribute("aria-sort") == "ascending"

    header.send_keys(KEYS.ENTER)

    assert page.find("#actors thead th").get_attribute("aria-sort") == "descending"
    assert page.column("actors", "name") == ["robot-2", "robot-1", "robot-0"]
    assert page.run("return document.activeElement.textContent.startsWith('Actor')")


def test_first_stop_of_the_keyboard_leads_to_the_content(page: Page) -> None:
    page.find("body").send_keys(KEYS.TAB)
    assert page.run("return document.activeElement.className") == "skip"

    page.browser.switch_to.active_element.send_keys(KEYS.ENTER)

    assert page.run("return document.activeElement.id") == "main"


def test_focus_is_visible(page: Page) -> None:
    page.find("body").send_keys(*[KEYS.TAB] * 3)

    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("opened", [False, True])
def test_phone_scrolls_only_down(browser: Any, address: str, opened: bool) -> None:
    show_as(browser, width=390, height=844)
    page = Page(browser, address)
    page.open()
    if opened:
        page.run("document.querySelector('#episodes .link').click()")
        page.wait(lambda: page.all("#episode-plots canvas"), "the episode is shown")
        assert page.run("const box = document.querySelector('dialog'); return box.scrollWidth <= box.clientWidth")

    assert page.run("return document.documentElement.scrollWidth") <= 390


def test_theme_follows_the_system_until_one_is_chosen(browser: Any, address: str) -> None:
    page = Page(browser, address)
    page.open()
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    show_as(browser, dark=True)
    dark = page.run(background)
    page.find("#theme").click()

    assert light != dark
    assert page.run(background) == light
    page.open()
    assert page.run(background) == light
    page.run("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("state", ["page", "episode", "phone"])
def test_axe_finds_nothing_serious(browser: Any, address: str, state: str, dark: bool) -> None:
    show_as(browser, width=390 if state == "phone" else 1280, dark=dark)
    page = Page(browser, address)
    page.open()
    if state == "episode":
        page.find("#episodes .link").click()
        page.wait(lambda: page.all("#episode-plots canvas"), "the episode is shown")

    assert page.violations() == []


def test_axe_finds_what_is_planted(page: Page) -> None:
    page.run("document.querySelector('#theme').removeAttribute('aria-label'); document.querySelector('#verdict-text').style.color = '#ddd'")

    assert page.violations() == ["button-name", "color-contrast"]


def test_login_with_a_token_opens_the_page_and_logout_ends_it(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    entries = (("trainer", "learner", LEARNER), ("robot", "actor", ACTOR))
    file.write_text("".join(f'[[token]]\nname = "{name}"\nrole = "{role}"\nvalue = "{value}"\n' for name, role, value in entries), "utf-8")
    file.chmod(0o600)
    with ServerThread(config_of(auth={"tokens_file": str(file)}), http=True) as server:
        page = Page(browser, server.http_address)
        browser.get(f"http://{page.address}/")
        assert page.violations() == []
        for token, reason in (("wrong-token-01234567", "does not know this token"), (ACTOR, "for actors")):
            page.find("#token").send_keys(token, KEYS.ENTER)
            page.wait(lambda reason=reason: page.all("#refused") and reason in page.text("#refused"), "the refusal is explained")

        page.find("#token").send_keys(LEARNER, KEYS.ENTER)

        page.wait(lambda: page.all("#connection") and page.text("#connection") == "Live", "the page is live")
        page.wait(lambda: page.find("#logout").is_displayed(), "the login can be ended")
        page.find("#logout button").click()
        page.wait(lambda: page.all("#token"), "the login page is back")
        assert request(page.address, "/api/status").status == 401
