import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jinja2
import markupsafe
import numpy as np
import pandas as pd
import pytest

import hydra_jax
from hydra_jax.analysis import results
from hydra_jax.analysis.results import Results
from hydra_jax.errors import UserError
from hydra_jax.report import figures, payload, templates
from hydra_jax.report import page as report
from tests.helpers import checkpoints
from tests.helpers import effects as toy_effects

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "</script><script>hacked = 1</script> the",
    '<img src=x onerror="window.hacked = 1"> the',
    "&lt;b&gt; <b>x</b> <i>in</i> the",
    "<a href='javascript:hacked=1'>of</a> the",
    "{{ data }} {% raw %} {# ]] the of \u2028 in",
]
TEXTS = [*HOSTILE, *(f"the {number} of the in" for number in range(20))]
BROWSER = shutil.which("chromium")
PATIENCE = 120
"""Seconds until a browser that does nothing is given up; a busy machine takes its time."""
browser_only = pytest.mark.skipif(not BROWSER, reason="no chromium here; install Debian's chromium and chromium-driver")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hydra_jax.load(str(checkpoints.gguf_file(tmp_path_factory.mktemp("model") / "tiny.gguf")))


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """A directory with the report of a sweep, kinds and heads beside it."""
    every = [
        Results(hydra_jax.sweep(model, TEXTS, kind=kind, sites=sites, replacements=2), samples=20)
        for kind, sites in (("resample", "attn,mlp"), ("zero", "attn,mlp"), ("zero", "heads"))
    ]
    directory = tmp_path_factory.mktemp("report")
    report.write(directory, every[0], *results.beside(every[0], every[1:]))
    return directory, every[0]


@pytest.fixture
def page(swept):
    """The report in headless Chromium, which logs what it asks of the network and what goes wrong."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    with tempfile.TemporaryDirectory() as profile:
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update"]
        flags += ["disable-background-networking", "disable-sync", f"user-data-dir={profile}"]
        for flag in flags:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get("about:blank")
            driver.get_log("performance")  # what the browser's own first page asked for
            driver.get(f"file://{swept[0] / report.PAGE}")
            # The script's last definition: the controls work, and every figure has its place.
            settled(driver, "return document.readyState === 'complete' && typeof again === 'function'")
            yield driver
        finally:
            driver.quit()


def settled(driver, script, *arguments):
    """What a script returns once that is true: figures are drawn, and the page is laid out, a little later."""
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(driver, PATIENCE)
    return wait.until(lambda d: d.execute_script(script, *arguments), f"not in {PATIENCE} s: {script} {arguments}")


def traces(driver, figure):
    """The data that a figure shows, once it shows what is chosen."""
    # Figures above grow as they are drawn: scroll again until this one is there. What is read is read in the same
    # breath, so that nothing is drawn in between.
    script = """
        const [id] = arguments, plot = document.getElementById("plot-" + id);
        document.getElementById(id).scrollIntoView();
        if (!drawn.has(id) || stale.has(id) || !plot.querySelector("svg")) return null;
        return plot.data.map((trace) => ({ x: [...trace.x], y: [...trace.y], name: trace.name }));
    """
    return settled(driver, script, figure)


def requests(driver):
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


@browser_only
@pytest.mark.slow
def test_every_figure_renders_and_nothing_goes_wrong_or_out(page, swept):
    figures = page.execute_script("return [...document.querySelectorAll('figure')].map(f => f.id)")
    assert figures == [
        *("layers", "against", "agreement", "prompt", "regress", "panels", "regression", "matrix", "erasure"),
        *("kinds", "heads", "motifs"),
    ]
    for figure in figures:
        assert traces(page, figure)
    assert [entry for entry in page.get_log("browser") if entry["level"] != "INFO"] == []
    # Each figure gets its buttons when it has been drawn.
    buttons = settled(
        page,
        "const bars = [...document.querySelectorAll('.plot')].map((p) => [...p.querySelectorAll('.modebar-btn')]);"
        "return bars.every((bar) => bar.length) && bars.flat().map((button) => button.dataset.title)",
    )
    assert set(buttons) == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}
    assert requests(page) == [f"file://{swept[0] / report.PAGE}"]
    settled(page, "return document.documentElement.scrollWidth <= window.innerWidth")
    assert len(page.find_elements("css selector", ".card .verdict")) == 6


@browser_only
@pytest.mark.slow
def test_prompts_stay_text(page):
    for figure in ("against", "prompt", "regress"):
        traces(page, figure)
    for prompt in range(len(TEXTS)):
        page.execute_script("update({prompt: arguments[0]})", prompt)
    assert page.execute_script("return window.hacked === undefined")
    assert (
        page.execute_script("return document.querySelectorAll('img, figure a[href^=javascript], figure b').length") == 0
    )
    texts = page.execute_script("return data.prompts.text")
    assert set(texts) == set(TEXTS)
    options = page.execute_script("return [...document.getElementById('prompt').options].map(o => o.textContent)")
    assert all(option.startswith(f"{text} →") for option, text in zip(options, texts, strict=True))


@browser_only
@pytest.mark.slow
def test_a_chosen_component_changes_what_the_figures_show(page, swept):
    effects = swept[1].effects
    for ablated in (0, 3):
        page.execute_script("document.getElementById('ablated').value = arguments[0]", ablated)
        page.execute_script("document.getElementById('ablated').dispatchEvent(new Event('change'))")
        against = {trace["name"]: trace for trace in traces(page, "against")}
        name = swept[1].ablated_names[ablated]
        expected = effects[["direct_effect", "total_effect"]].mean("replacement").isel(ablated=ablated)
        np.testing.assert_allclose(against[name]["x"], expected["direct_effect"], atol=1e-6)
        np.testing.assert_allclose(against[name]["y"], expected["total_effect"], atol=1e-6)
        one = traces(page, "prompt")
        prompt = page.execute_script("return state.prompt")
        after = [value for trace in one if trace["name"] == "ablated run" for value in trace["y"]]
        clean = effects["delta_unembed"].values[prompt]
        changed = clean + effects["compensation"].values[prompt, ablated]
        changed[ablated] -= expected["direct_effect"].values[prompt]
        np.testing.assert_allclose(after, np.concatenate([changed[::2], changed[1::2]]), atol=1e-4)


@browser_only
@pytest.mark.slow
def test_the_keyboard_reaches_a_component_and_a_prompt(page):
    from selenium.webdriver import ActionChains, Keys

    for _ in range(3):
        ActionChains(page).send_keys(Keys.TAB).perform()
        if page.switch_to.active_element.get_attribute("id") == "ablated":
            break
    else:
        pytest.fail("Tab does not reach the choice of a component")
    before = page.execute_script("return state.ablated")
    other = Keys.ARROW_UP if before else Keys.ARROW_DOWN
    ActionChains(page).send_keys(other).perform()
    settled(page, "return state.ablated !== arguments[0]", before)
    ActionChains(page).send_keys(Keys.TAB).send_keys("17 OF").perform()
    settled(page, "return document.getElementById('prompt').options.length === 1")
    assert page.execute_script("return data.prompts.text[state.prompt]") == "the 17 of the in"
    assert page.find_element("id", "status").text == f"1 of {len(TEXTS)} prompts"
    traces(page, "prompt")
    assert "the 17 of the in" in page.find_element("id", "note-prompt").text


@browser_only
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_screens_of_all_widths(page, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    for figure in ("layers", "matrix", "heads"):
        traces(page, figure)
    # Figures that were drawn at another width are laid out again.
    settled(page, "return document.documentElement.scrollWidth <= arguments[0]", width)
    dark_paper = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every((part) => part < 60)"
    settled(page, dark_paper)


def test_packed_compensation_comes_back():
    random = np.random.default_rng(0)
    compensation = random.normal(0, 1, (5, 3, 6)).astype(np.float32)
    for ablated in range(3):
        compensation[:, ablated, : ablated + 1] = 0
    compensation[2, 1] = 0
    firsts = [payload.first_downstream(compensation[:, ablated]) for ablated in range(3)]
    assert firsts == [1, 2, 3]
    packed, scale = payload.pack(compensation, firsts)
    whole = np.frombuffer(base64.b64decode(packed), "<i2").reshape(5, -1)
    scale = np.frombuffer(base64.b64decode(scale), "<f4").reshape(5, 3)
    for ablated, columns in enumerate(np.split(whole, np.cumsum([6 - first for first in firsts])[:-1], axis=1)):
        back = columns * scale[:, [ablated]]
        np.testing.assert_allclose(back, compensation[:, ablated, firsts[ablated] :], atol=2e-4)


@pytest.mark.slow
def test_the_page_of_1209_prompts_is_below_15_megabytes():
    random = np.random.default_rng(0)
    direct = random.normal(1, 1, (1209, 60, 1)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2, texts=["The mother tongue of Danielle Darrieux is" * 2] * 1209)
    for ablated in range(60):
        effects["compensation"][:, ablated, ablated + 1 :] = 0.5
    text = report.page(Results(effects, samples=10))
    assert len(text.encode()) < 15_000_000
    assert "for models that soft-cap their logits (Gemma 2), before the cap" in text
    assert json.loads(text.partition('id="data">')[2].partition("</script>")[0])["prompts"]["note"] == ""


def test_of_more_prompts_than_fit_some_are_drawn(monkeypatch):
    monkeypatch.setattr(payload, "PROMPT_BYTES", 3000)
    random = np.random.default_rng(0)
    direct = random.normal(1, 1, (30, 4, 1)).astype(np.float32)
    effects = toy_effects.effects(direct, direct / 2)
    effects["compensation"][:, 0, 1:] = 1
    tree = payload.payload(Results(effects, samples=10), (), None)
    assert 0 < len(tree["prompts"]["text"]) < 30
    assert f"of {30} prompts" in tree["prompts"]["note"]


@pytest.mark.slow
def test_tables_are_the_same_as_csv_and_parquet(swept):
    for name in ("summary", "erasure", "findings"):
        text = pd.read_csv(swept[0] / f"{name}.csv", keep_default_na=name == "summary")
        binary = pd.read_parquet(swept[0] / f"{name}.parquet")
        pd.testing.assert_frame_equal(text, binary, check_dtype=False, rtol=1e-4, atol=1e-5)


def test_sweeps_that_do_not_go_together_are_refused():
    direct = np.ones((3, 2, 1), np.float32)
    of = {
        name: Results(toy_effects.effects(direct, direct, kind=kind, model=model))
        for name, kind, model in (
            ("this", "zero", "a"),
            ("again", "zero", "a"),
            ("other", "mean", "b"),
            ("mean", "mean", "a"),
        )
    }
    with pytest.raises(UserError, match="beside one of"):
        results.beside(of["this"], [of["other"]])
    with pytest.raises(UserError, match="two sweeps"):
        results.beside(of["this"], [of["again"]])
    elsewhere = of["mean"].effects.assign_coords(prompt_id=("prompt", np.array(["x", "y", "z"], object)))
    with pytest.raises(UserError, match="no prompt in common"):
        results.beside(of["this"], [Results(elsewhere)])
    overlap = of["mean"].effects.assign_coords(prompt_id=("prompt", np.array(["2", "y", "0"], object)))
    kinds, heads = results.beside(of["this"], [Results(overlap)])
    assert [sorted(each.effects["prompt_id"].values) for each in kinds] == [["0", "2"]] * 2
    assert heads is None


@browser_only
@pytest.mark.slow
def test_a_page_with_everything_renders(tmp_path):
    from selenium import webdriver

    report.write(tmp_path, Results(toy_effects.rich(), samples=10))
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(f"file://{tmp_path / report.PAGE}")
            settled(driver, "return document.readyState === 'complete' && typeof again === 'function'")
            sets = [index for index, name in enumerate(toy_effects.PAIRS) if "+" in name]
            for ablated in (sets[0], 0):
                driver.execute_script("update({ablated: arguments[0]})", ablated)
                for figure in ("layers", "against", "prompt", "regress", "panels", "matrix"):
                    assert traces(driver, figure)
            gaps = "return document.getElementById('plot-prompt').data.map((trace) => [...trace.y].includes(null))"
            driver.execute_script("update({ablated: arguments[0]})", sets[0])
            traces(driver, "prompt")
            assert any(driver.execute_script(gaps))  # of components ablated together no one's own part is known
            widths = driver.execute_script(
                "return [...document.querySelectorAll('.picture')].map((i) => i.naturalWidth)"
            )
            assert len(widths) == len(figures.OPTIONAL)
            assert min(widths) > 500
            assert [entry for entry in driver.get_log("browser") if entry["level"] != "INFO"] == []
            settled(driver, "return document.documentElement.scrollWidth <= window.innerWidth")
        finally:
            driver.quit()


def test_templates_escape_what_is_not_marked_as_safe():
    values = {"step": 1, "prompts": 2, "reference": "<b>", "arms": ["'\"<i>"], "sites": {"<s>": {"<m>": ["<c>"]}}}
    values |= {"about": "&amp;", "pictures": {'"><img src=x>': "AAAA"}, "paragraphs": ["</p>"]}
    text = templates.render("comparison.html", **values)
    for raw in ("<b>", "<i>", "<s>", "<m>", "<c>", "<img src=x", "</p></p>", "&amp; "):
        assert raw not in text
    assert "&amp;amp; 2 prompts, step 1; * clearly differs from &lt;b&gt;." in text
    with pytest.raises(jinja2.UndefinedError, match="pictures"):
        templates.render("comparison.html", **{name: values[name] for name in values if name != "pictures"})


def test_data_cannot_end_its_script():
    tree = {"text": HOSTILE}
    text = templates.script_data(tree)
    assert "<" not in text
    assert json.loads(text) == tree
    with pytest.raises(ValueError, match="not JSON compliant"):
        templates.script_data([float("nan")])


def test_a_section_that_is_not_marked_as_safe_is_escaped():
    direct = np.ones((3, 2, 1), np.float32)
    results = Results(toy_effects.effects(direct, direct / 2), samples=5)
    assert "<mark>" not in report.page(results, comparison="<mark>")
    assert "<mark>" in report.page(results, comparison=markupsafe.Markup("<mark>"))


def test_drawing_libraries_are_imported_when_something_is_drawn():
    modules = "hydra_jax.report.page,hydra_jax.report.figures.training,hydra_jax.comparison.report"
    command = [sys.executable, "-m", "tests.programs.loaded", modules, "matplotlib", "plotly", "scipy.stats"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
