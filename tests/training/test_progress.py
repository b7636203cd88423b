"""progress.py: what a run knows of itself comes back after an interruption. What train does with it: test_loop.py."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

from minipeft.data.batches import collate
from minipeft.errors import ConfigError
from minipeft.training import distributed as parallel
from minipeft.training.optimizer import adamw
from minipeft.training.progress import Progress, Stopwatch, progress_bar

BATCH = collate([np.array([1, 2]), np.array([3]), np.array([4, 5])], [0, 1, 0])


def new_progress(folder=None, best_by="accuracy", **settings):
    model = nn.Linear(2, 2)
    optimizer = adamw(model.parameters(), model, learning_rate=1e-2)
    return Progress(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), best_by, folder, settings)


def found(accuracy, loss, **more):
    return {"accuracy": accuracy, "loss": loss, **more}


def test_a_stopwatch_goes_on_from_an_earlier_sitting():
    clock = Stopwatch(seconds=100.0, core_seconds=50.0)
    assert 100 <= clock.seconds < 101 and 50 <= clock.core_seconds < 51
    assert clock.seconds <= clock.seconds


def test_a_point_of_the_curve_has_the_means_since_the_last_one():
    progress = new_progress()
    for losses in ([3.0, 0.0], [6.0, 3.0]):
        progress.count([BATCH], [torch.tensor(losses)])
    assert (progress.step, progress.samples) == (2, 6)
    assert progress.validated(found(0.5, 0.7), rate=0.1, steps_per_epoch=4)
    progress.count([BATCH, BATCH], [torch.tensor([1.5, 1.0]), torch.tensor([1.5, 2.0])])
    assert not progress.validated(found(0.4, 0.9), rate=0.2, steps_per_epoch=4)
    assert [(point["train_loss"], point["train_accuracy"], point["epoch"]) for point in progress.curve] == [
        (1.5, 0.5, 0.5), (0.5, 0.5, 0.75)]
    assert progress.best == {"step": 2, "accuracy": 0.5, "loss": 0.7}
    assert progress.line(8) == "step 3/8: train loss 0.500, validation loss 0.900, validation accuracy 0.4000"


def test_a_bar_shows_the_mean_loss_of_its_process_also_beside_others(monkeypatch):
    progress = new_progress()
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    progress.count([BATCH, BATCH], [torch.tensor([2.1, 3.0])])  # of six targets three are this process's
    assert progress.running() | {"samples_per_s": ""} == {"loss": "0.700", "accuracy": "1.000", "samples_per_s": ""}


@pytest.mark.parametrize(("best_by", "validations", "best"), [
    ("accuracy", [found(0.5, 0.9), found(0.6, 1.9)], 1), ("loss", [found(0.5, 0.9), found(0.6, 1.9)], 0),
    ("accuracy", [found(0.5, 0.9), found(0.5, 0.8), found(0.5, 0.8)], 1),
    ("f1", [found(0.9, 0.1, f1=0.0), found(0.8, 0.3, f1=0.2)], 1),
    ("loss", [found(0.5, 0.9), found(0.9, math.nan)], 0), ("loss", [found(0.5, math.nan), found(0.4, 0.9)], 1),
    ("accuracy", [found(0.5, 0.9), found(0.9, math.nan)], 0), ("accuracy", [found(0.6, math.inf), found(0.5, 0.9)], 1)])
def test_the_best_validation_is_the_first_of_the_highest_figure_or_the_lowest_loss(best_by, validations, best):
    progress = new_progress(best_by=best_by)
    improved = []
    for validation in validations:
        progress.count([BATCH], [torch.tensor([1.0, 1.0])])
        improved.append(progress.validated(validation, 0.1, 4))
    assert progress.best["step"] == best + 1
    assert [number for number, is_best in enumerate(improved) if is_best][-1] == best


def test_validations_since_the_best_one_are_counted():
    progress, counts = new_progress(best_by="loss"), [0]
    assert progress.since_best() == 0
    for loss in (0.5, 0.6, 0.5, 0.4, 0.9):
        progress.count([BATCH], [torch.tensor([1.0, 1.0])])
        progress.validated(found(0.5, loss), 0.1, 4)
        counts.append(progress.since_best())
    assert counts == [0, 0, 1, 2, 0, 1]


def test_the_best_values_come_back_and_later_ones_do_not(tmp_path):
    progress = new_progress(tmp_path, learning_rate=1e-2)
    progress.count([BATCH], [torch.tensor([1.0, 1.0])])
    progress.validated(found(0.5, 0.9), 0.1, 4)
    best = progress.model.weight.detach().clone()
    with torch.no_grad():
        progress.model.weight.add_(1.0)
    progress.count([BATCH], [torch.tensor([1.25, 2.0])])
    progress.save()

    resumed = new_progress(tmp_path, learning_rate=1e-2)
    resumed.resume()
    assert (resumed.step, resumed.samples, resumed.curve, resumed.best) == (
        2, 6, progress.curve, progress.best)
    assert torch.equal(resumed.model.weight, best + 1.0)
    resumed.restore_best()
    assert torch.equal(resumed.model.weight, best)
    resumed.validated(found(0.5, 0.8), 0.1, 4)
    assert resumed.curve[-1]["train_loss"] == round(1.25 / 3, 4), "the sums since the last validation came along"


def test_where_a_run_goes_on_is_said(tmp_path):
    progress, asked = new_progress(tmp_path), []
    assert progress.resumed(8, ends_at=None) == f"nothing to resume in {tmp_path}: training from the start"
    progress.count([BATCH], [torch.ones(2)])
    progress.validated(found(0.5, 0.7), 0.1, 4)
    progress.save()
    ended = " of 8: this training has ended"
    told = new_progress(tmp_path).resumed(8, ends_at=lambda *at: asked.append(at) or True)
    assert told == f"resumed at step 1{ended}"
    assert new_progress(tmp_path).resumed(8, ends_at=lambda *at: False) == "resumed at step 1 of 8"
    assert asked == [(1, 0)]


def test_nothing_is_resumed_from_nothing_or_from_a_run_with_other_settings(tmp_path):
    for folder in (None, tmp_path / "empty"):
        progress = new_progress(folder)
        progress.resume()
        assert (progress.step, progress.curve, progress.best) == (0, [], {})
    progress = new_progress(tmp_path, epochs=3)
    progress.count([BATCH], [torch.tensor([1.0, 1.0])])
    progress.save()
    with pytest.raises(ConfigError, match=r"other settings \(epochs\): .* without --resume"):
        new_progress(tmp_path, epochs=4).resume()


# --- bars -------------------------------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.kind("7: no bars in a file or a pipe")
@pytest.mark.parametrize(("stderr", "title", "rank", "shown"), [
    (Terminal, "testing", 0, True), (io.StringIO, "testing", 0, False), (Terminal, None, 0, False),
    (Terminal, "testing", 1, False)])
def test_a_bar_is_for_a_terminal_and_its_lines_are_for_all(monkeypatch, capsys, stderr, title, rank, shown):
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    with progress_bar(3, "text", title) as bar:
        bar.update(3)
        bar.write("a validation")
    assert ("\r" in sys.stderr.getvalue()) == ("testing" in sys.stderr.getvalue()) == shown
    assert capsys.readouterr().out == "a validation\n"


def test_without_a_standard_error_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(3, "text", "testing") as bar:
        bar.update(3)
        bar.write("a validation")
    assert capsys.readouterr().out == "a validation\n"
