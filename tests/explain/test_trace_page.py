"""trace_page.py: the page in a real browser, stepped through by keyboard and by finger, without a network."""

from __future__ import annotations

import re

import pytest
from browser import browser
from helpers import write_tiny_model

from minipeft.errors import OutputError
from minipeft.explain.trace import fresh, trace
from minipeft.explain.trace_page import page, write_page
from minipeft.methods import METHODS

TEXT = 'a good <film> & "more"'
AT = "document.getElementById('at').textContent"
SHOWN = "[...document.querySelectorAll('.step')].filter(step => step.offsetParent).length"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page for each method: {method: (its trace, its file)}."""
    folder = tmp_path_factory.mktemp("pages")
    tiny, found = write_tiny_model(folder / "tiny"), {}
    for method in METHODS:
        model, tokenizer, start = fresh(str(tiny), method, {})
        found[method] = (trace(model, tokenizer, TEXT, start=start), folder / f"{method}.html")
        write_page(*found[method])
    return found


def steps_of(found):
    """How many steps a trace has: one for each term, or for why it is not merged."""
    return sum(len(line.terms) for place in found.places for line in [*place.forward, *place.merged]) + bool(
        found.why_not_merged)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_has_a_step_for_each_term_and_its_numbers(pages, method):
    found, file = pages[method]
    text = file.read_text(encoding="utf-8")
    assert text.count('<li class="step"') == steps_of(found)
    assert text.count('class="equal"') == sum(len([*place.forward, *place.merged]) for place in found.places)
    assert "&lt;" in text and "<film>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text and "https:" not in text


def test_without_scripts_all_steps_are_there_to_read(pages):
    text = pages["lora"][1].read_text(encoding="utf-8")
    body = text[text.index("<body>"):]
    assert 'class="stepping"' not in body and re.search(r"<nav[^>]* hidden>", body)


def test_the_page_works_by_keyboard_by_finger_and_in_both_schemes_without_an_error(pages):
    with browser() as chromium:
        for method, (found, file) in pages.items():
            steps, dark = steps_of(found), len(method) % 2 == 0
            shown = chromium.open(file, width=390, height=800, dark=dark)
            assert shown.evaluate(AT) == f"1 of {steps}" and shown.evaluate(SHOWN) == 1, method
            assert not shown.overflows(), method
            shown.press("ArrowRight", 2)
            assert shown.evaluate(AT) == f"3 of {steps}", method
            shown.press("ArrowLeft")
            shown.click("#next")
            assert shown.evaluate(AT) == f"3 of {steps}", method
            shown.press("End")
            assert shown.evaluate(AT) == f"{steps} of {steps}" and not shown.overflows(), method
            shown.press("ArrowRight")
            assert shown.evaluate(AT) == f"{steps} of {steps}", method
            shown.press("Home")
            shown.click("#merge")
            assert "Merge" in shown.evaluate("document.querySelector('.current h2').textContent"), method
            shown.click("#all")
            assert shown.evaluate(SHOWN) == steps and not shown.overflows(), method
            background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) < 300) == dark
            assert shown.errors == [] and shown.requests == [file.resolve().as_uri()], method


def test_buttons_are_large_enough_for_a_finger_and_can_be_reached_with_tab(pages):
    with browser() as chromium:
        shown = chromium.open(pages["lora"][1], width=390, height=800)
        assert min(shown.evaluate("[...document.querySelectorAll('nav button')].map(b => b.offsetHeight)")) >= 44
        shown.press("Tab", 2)  # the details, then the first button that is not disabled
        assert shown.evaluate("document.activeElement.id") == "next"
        assert not shown.errors


def test_the_browser_does_tell_errors(tmp_path):
    (tmp_path / "bad.html").write_text("<script>missing(); </script><script>console.error('no')</script>"
                                       "<img src='gone.png'><div style='width: 2000px'>wide</div>")
    with browser() as chromium:
        shown = chromium.open(tmp_path / "bad.html", width=390)
        assert any("missing is not defined" in error for error in shown.errors)
        assert any("no" in error for error in shown.errors) and any("gone.png" in url for url in shown.requests)
        assert shown.overflows()


def test_a_page_that_cannot_be_written_is_an_output_error(pages, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_page(pages["lora"][0], tmp_path / "file" / "page.html")


def test_a_page_names_the_token_and_where_the_adapter_is_from(pages):
    found, _ = pages["lora"]
    text = page(found)
    assert text.count('class="token chosen"') == 1 and "moved: at its start it changes nothing" in text
