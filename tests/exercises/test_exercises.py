"""The exercises: right answers pass, however they are written, and each wrong one gets its own message."""

from __future__ import annotations

import functools
import inspect
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from documents import ROOT

from exercises import answers
from minipeft.check import judging
from minipeft.check.__main__ import EXERCISES
from minipeft.check.answers import load
from minipeft.check.grading import PROPERTIES, exercise, grade

each_exercise = pytest.mark.parametrize("method", EXERCISES)
each_mistake = pytest.mark.parametrize(("method", "mistake"), [
    pytest.param(method, mistake, id=f"{method}: {mistake.title}")
    for method in EXERCISES for mistake in answers.mistakes(method)])
FEWEST_MISTAKES = 10


def properties_of(method):
    return [title for key, title in PROPERTIES.items() if hasattr(exercise(method), key)]


# --- right ones -------------------------------------------------------------------------------------------------------

@each_exercise
@pytest.mark.parametrize("kind", ["right", "otherwise"])
def test_a_right_answer_holds_in_every_property(method, kind):
    outcomes = list(grade(method, answers.HERE / kind / f"{method}.py"))
    assert outcomes == [(title, None) for title in properties_of(method)]


@each_exercise
def test_the_template_is_refused_as_not_written_yet(method):
    [(title, refused)] = grade(method, ROOT / "exercises" / f"{method}.py")
    assert title == PROPERTIES["shapes"]
    assert "not written yet" in refused.got and refused.because == "there is a hole of the template left"


@each_exercise
def test_every_name_of_the_template_is_called(method):
    """Each function or method of the right answer in turn becomes a hole: some property falls into it."""
    for name in exercise(method).NAMES:
        answer = load(answers.HERE / "right" / f"{method}.py")

        def hole(*arguments, name=name):
            raise NotImplementedError(name)

        *path, last = name.split(".")
        place = answer if not path else getattr(answer, path[0])
        if inspect.isclass(getattr(place, last)):
            place, last = getattr(place, last), "__init__"
        setattr(place, last, hole)
        with pytest.raises(NotImplementedError, match=name):
            for key in PROPERTIES:
                getattr(exercise(method), key, lambda answer: None)(answer)


# --- wrong ones -------------------------------------------------------------------------------------------------------

@functools.cache
def outcomes_of(method, mistake):
    """Each property that was looked at, and why it does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.py"
        path.write_text(mistake.source, encoding="utf-8")
        return list(grade(method, path))


@each_mistake
def test_a_mistake_is_refused_with_its_own_message(method, mistake):
    (*held, (title, refused)) = outcomes_of(method, mistake)
    assert all(outcome is None for _, outcome in held)
    assert refused is not None, "it passes"
    assert mistake.says and mistake.says in refused.because, (title, refused.because, refused.got, refused.expected)


@each_exercise
def test_no_two_mistakes_of_an_exercise_get_the_same_message(method):
    found = {}
    for mistake in answers.mistakes(method):
        found.setdefault(outcomes_of(method, mistake)[-1][1].because, []).append(mistake.title)
    assert not {says: titles for says, titles in found.items() if len(titles) > 1}
    assert len(found) >= FEWEST_MISTAKES


@each_exercise
def test_known_wrong_values_differ_from_each_other(method, monkeypatch):
    """Or somebody could be told of a misconception and have another one."""
    compared = []

    def noting(what, got, expected, given="", wrong=None, tolerance=1e-5):
        compared.append({name: value for name, value in (wrong or {}).items() if not judging.close(value, expected)})
        judging.expect(what, got, expected, given, wrong, tolerance)

    monkeypatch.setattr(exercise(method), "expect", noting)
    assert all(refused is None for _, refused in grade(method, answers.HERE / "right" / f"{method}.py"))
    assert any(compared)
    for wrong in compared:
        for (one, a), (other, b) in itertools.combinations(wrong.items(), 2):
            assert not judging.close(a, b), (one, other)


# --- templates --------------------------------------------------------------------------------------------------------

def test_every_exercise_has_all_its_files():
    for folder in (ROOT / "exercises", *(answers.HERE / kind for kind in ("right", "otherwise", "mistakes"))):
        assert {path.stem for path in folder.glob("*.py")} == set(EXERCISES), folder


@each_exercise
def test_template_and_right_answer_have_the_same_signatures_which_are_those_the_grader_calls(method):
    template, right = (load(folder / f"{method}.py") for folder in (ROOT / "exercises", answers.HERE / "right"))
    for name, count in exercise(method).NAMES.items():
        values = [template, right]
        for part in name.split("."):
            values = [getattr(value, part) for value in values]
        assert inspect.signature(values[0]) == inspect.signature(values[1]), name
        assert len(inspect.signature(values[0]).parameters) == count + ("." in name), name


@each_exercise
def test_a_template_says_how_to_check_it_and_where_to_read_on(method):
    text = load(ROOT / "exercises" / f"{method}.py").__doc__
    assert f"python -m minipeft.check {method} FILE" in text and "docs/exercises.md" in text
    holes = {"four": 4, "three": 3, "five": 5, "six": 6}
    source = (ROOT / "exercises" / f"{method}.py").read_text(encoding="utf-8")
    [word] = [word for word in holes if f"Fill in the {word} holes" in text]
    assert source.count("raise NotImplementedError") == holes[word]


# --- judging ----------------------------------------------------------------------------------------------------------

def test_a_right_value_of_another_dtype_is_no_misconception():
    right = torch.tensor([1.0, 2.0])
    assert refusal(judging.expect, "y", right.double(), right, wrong={"exchanged": right}).because == ""


def refusal(function, *arguments, **named):
    with pytest.raises(judging.Refused) as caught:
        function(*arguments, **named)
    return caught.value


def test_a_misconception_is_named_only_where_its_value_is_what_came_out():
    right, wrong = torch.tensor([1.0, 2.0]), {"doubled": torch.tensor([2.0, 4.0])}
    judging.expect("y", right + 1e-7, right, wrong=wrong)
    assert refusal(judging.expect, "y", 2 * right, right, wrong=wrong).because == "doubled"
    assert refusal(judging.expect, "y", 3 * right, right, wrong=wrong).because == ""


def test_the_input_of_an_answer_stays_as_it_is_or_that_is_the_mistake():
    x = torch.tensor([1.0, 2.0])
    assert refusal(judging.call, "layer(x)", lambda x: x.mul_(2), x).because.startswith(
        "layer(x) changes its input in place")
    assert x.tolist() == [1, 2] and judging.call("layer(x)", lambda x: 2 * x, x).tolist() == [2, 4]


def test_a_wrong_dtype_is_no_mistake_of_the_formula(tmp_path):
    path, right = tmp_path / "answer.py", (answers.HERE / "right" / "lora.py").read_text(encoding="utf-8")
    path.write_text(right.replace("return y + self.scaling * F.linear(inner, self.lora_B)",
                                  "return (y + 2 * F.linear(inner, self.lora_B)).float()"), encoding="utf-8")
    [(_, refused)] = grade("lora", path)
    assert (refused.got, refused.because) == ("torch.float32", "")


@pytest.mark.parametrize(("method", "old", "new"), [
    ("dora", "        self.scaling = lora_alpha / r\n",
     "        self.scaling = nn.Parameter(torch.tensor(lora_alpha / r), requires_grad=False)\n"),
    ("adapter", "        self.scaling = scaling\n",
     "        self.scaling = nn.Parameter(torch.tensor(float(scaling)), requires_grad=False)\n")])
def test_a_scale_may_be_a_frozen_parameter(method, old, new, tmp_path):
    path, right = tmp_path / "answer.py", (answers.HERE / "right" / f"{method}.py").read_text(encoding="utf-8")
    assert old in right
    path.write_text(right.replace(old, new), encoding="utf-8")
    assert all(refused is None for _, refused in grade(method, path))


def test_what_differs_is_shown_whole_or_at_its_first_place():
    small = refusal(judging.expect, "y", torch.tensor([[1.0, 2.5]]), torch.tensor([[1.0, 3.0]]))
    assert (small.got, small.expected) == ("[[1, 2.5]]", "[[1, 3]]")
    large = torch.zeros(5, 5)
    large[2, 3] = large[4, 4] = 7
    shown = refusal(judging.expect, "y", large, torch.zeros(5, 5))
    assert (shown.got, shown.expected) == ("7 at [2, 3], the first of 2 numbers that differ", "0")


@pytest.mark.parametrize(("got", "text"), [(None, "NoneType"), ([1.0], "list"), (torch.zeros(3), "shape (3,)"),
                                           (torch.zeros(2, dtype=torch.float64), "torch.float64")])
def test_another_type_shape_or_dtype_is_refused(got, text):
    assert refusal(judging.expect, "y", got, torch.zeros(2)).got == text


def test_a_gradient_that_is_half_cut_off_is_refused():
    x = torch.randn(2, dtype=torch.float64, requires_grad=True)
    judging.check_gradients("y", lambda: x * x, {"x": x})
    assert "is cut off" in refusal(judging.check_gradients, "y", lambda: x * x.detach(), {"x": x}).because
    assert "no gradient reaches x" in refusal(judging.check_gradients, "y", lambda: x.detach(), {"x": x}).because
