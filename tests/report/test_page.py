"""page.py: one file that shows a comparison; opened in a browser it sorts, filters, draws, and complains of nothing."""

from __future__ import annotations

import json
import re

import pytest
from browser import browser

from minipeft.report.page import page, write_page

ROWS = "[...document.querySelectorAll('tbody tr')].filter(row => row.dataset.name)"


@pytest.fixture(scope="module")
def file(comparison, tuning, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(comparison, tuning, path)
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


def names(opened):
    return opened.evaluate(f"{ROWS}.map(row => row.dataset.name)")


def choose(opened, control, value):
    opened.evaluate(f"(() => {{ const c = document.getElementById('{control}'); c.value = {json.dumps(value)};"
                    "c.dispatchEvent(new Event('input')) })()")


def test_it_loads_nothing_and_names_every_method_without_scripts(comparison, tuning):
    text = page(comparison, tuning)
    assert not re.search(r"""(src|href)=["'](?!data:|comparison/)""", text)
    assert "$" not in re.sub(r"\$\{|`.*?`", "", text)
    plain = text.partition("<noscript>")[2].partition("</noscript>")[0]
    assert "<h2>imdb</h2>" in plain and all(f"<td>{method}</td>" in plain for method in ("lora", "prefix", "full"))


def test_each_finding_points_at_pictures_beside_the_page(comparison, tuning):
    items = re.findall("<li>(.*)</li>", page(comparison, tuning))
    assert len(items) == 13 and all(re.search(r'\(<a href="comparison/\w+\.svg">\w+</a>', item) for item in items)


def test_a_page_of_text_that_looks_like_markup_stays_text(comparison, tuning):
    strange = json.loads(json.dumps(comparison).replace("films", "<!--<script></script><b>"))
    text = page(strange, tuning)
    assert "<" not in text.partition('id="data">')[2].partition("</script>\n<script>")[0]


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)], ids=["desk", "phone, dark"])
def test_it_opens_without_a_complaint_or_a_request_and_fits_its_window(chromium, file, width, dark):
    opened = chromium.open(file, width=width, dark=dark)
    assert not opened.errors and opened.requests == [file.as_uri()] and not opened.overflows()
    assert len(opened.evaluate("[...document.querySelectorAll('.point')].map(p => p.dataset.name)")) == 12
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(23, 23, 27)" if dark else "rgb(251, 251, 250)")


def test_a_heading_sorts_and_a_second_time_the_other_way(chromium, file):
    opened = chromium.open(file)
    choose(opened, "dataset", "films")
    assert names(opened)[0] == "full" and names(opened)[-1] == "zero-shot by prompt"
    opened.click("button[data-key=parameters]")
    assert names(opened)[:2] == ["zero-shot by prompt", "prefix"]
    assert opened.evaluate("document.querySelector('th[aria-sort=ascending]').textContent") == "trained parameters"
    opened.click("button[data-key=parameters]")
    assert names(opened)[0] == "full"
    assert opened.evaluate("document.activeElement.dataset.key") == "parameters"
    opened.press("Enter")  # the focus has stayed on the heading
    assert names(opened)[0] == "zero-shot by prompt" and not opened.errors


def test_it_filters_by_name_and_by_kind_and_the_picture_follows(chromium, file):
    opened = chromium.open(file)
    choose(opened, "dataset", "films")
    choose(opened, "filter", "RA")
    assert sorted(names(opened)) == ["dora", "lora", "vera"]
    assert opened.evaluate("document.querySelectorAll('.point').length") == 3
    assert opened.evaluate("document.getElementById('count').textContent") == "3 of 12 rows"
    choose(opened, "filter", "")
    choose(opened, "kind", "baseline")
    assert names(opened) == ["zero-shot by prompt"]
    assert opened.evaluate("document.getElementById('picture').textContent") == "Nothing to draw."
    choose(opened, "kind", "merges")
    assert "adapter" not in names(opened) and "lora" in names(opened) and not opened.errors


def test_another_dataset_and_another_axis(chromium, file):
    opened = chromium.open(file)
    choose(opened, "dataset", "films")
    assert "lora, without the budget" not in names(opened)
    choose(opened, "dataset", "imdb")
    assert "reported elsewhere: GPT-2 124M, full fine-tuning" in names(opened)
    assert "lora, without the budget" in names(opened)
    for axis in opened.evaluate("[...document.getElementById('axis').options].map(o => o.value)"):
        choose(opened, "axis", axis)
        assert opened.evaluate("document.querySelectorAll('.point').length") >= 11, axis
    assert not opened.errors


def test_a_point_shows_its_values_at_the_mouse_and_by_keyboard(chromium, file):
    opened = chromium.open(file)
    hint = "document.getElementById('hint')"
    assert opened.evaluate(f"{hint}.hidden")
    opened.click(".point[data-name=lora] .mark")
    assert "trained parameters: 875,000" in opened.evaluate(f"{hint}.textContent")
    assert "interval: " in opened.evaluate(f"{hint}.textContent")
    assert opened.evaluate("document.querySelector('tr.chosen').dataset.name") == "lora"
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.classList.contains('point')")
    assert not opened.evaluate(f"{hint}.hidden") and not opened.errors
