"""The benchmark: who takes turns, on which texts, and what the report says; one part of it run for real."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from documents import results_changed
from helpers import ROOT
from job import Turn
from parts import Benchmark
from tables import WRITER, benchmark_headline, benchmark_tables, speed_section, speed_table, write_speed
from training_sides import TimedBatches
from turns import take_turns

from minipeft.errors import OutputError
from minipeft.runs.results import BLOCK_END, BLOCK_START


class Recorded:
    """A side that notes when it has its turn and takes a known time."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, iter(seconds)

    def turn(self):
        self.log.append(self.name)
        return {"seconds": float(next(self.seconds)), "peak_memory_bytes": 7}

    def end(self):
        self.log.append(f"{self.name} ends")


def test_sides_alternate_and_the_first_turn_does_not_count():
    log = []
    found = take_turns({"a": Recorded("a", log, [9, 1, 2, 3]), "b": Recorded("b", log, [90, 4, 4, 7])}, 3)
    assert log == ["a", "b"] * 4 + ["a ends", "b ends"]
    assert (found["a"]["seconds"], found["a"]["seconds_low"], found["a"]["seconds_high"]) == (2, 1, 3)
    assert (found["b"]["seconds"], found["b"]["turns"]) == (4, 3)


@pytest.fixture
def material(tmp_path):
    options = argparse.Namespace(device="cpu", quick=True, rounds=2, dataset="sample", data_dir=None)
    return Benchmark(options, tmp_path)


def test_both_sides_of_a_turn_see_the_same_texts_in_other_batches(material):
    plain = material.batches(6, 3, 64, grouped=False)
    grouped = material.batches(6, 3, 64, grouped=True)
    assert all(len(rows) == material.batch_size for rows in plain + grouped)
    for turn in (slice(0, 3), slice(3, 6)):
        assert sorted(i for rows in plain[turn] for i in rows) == sorted(i for rows in grouped[turn] for i in rows)
    assert plain != grouped


def test_full_batches_hold_only_texts_that_need_no_padding(material):
    assert all(len(material.ids[i]) >= 32 for rows in material.batches(4, 1, 32, False, full=True) for i in rows)


def cells(seconds, memory, **more):
    return {"seconds": seconds, "seconds_low": seconds, "seconds_high": seconds, "peak_memory_bytes": memory,
            "samples_per_second": 1 / seconds, "mean_loss": 0.7, **more}


def test_the_headline_takes_the_worse_of_two_lengths_and_tables_name_what_was_not_measured():
    rows = {f"{row} {length}": {"ours": cells(1, 2**30), "peft": cells(speedup, 2**31), "speedup": speedup,
                                "memory_ratio": ratio}
            for row, length, speedup, ratio in (("default", 256, 3.0, 0.3), ("default", 512, 2.5, 0.4),
                                                ("matched", 256, 1.4, 0.5), ("matched", 512, 1.6, 0.35))}
    results = {"cpu": {"machine": {"processor": "P", "cores": 2}, "batch_size": 16, "training": rows,
                       "model": {"parameters": 124e6, "weights": "random"}}}
    assert benchmark_headline(results) == {"speedup_vs_peft": 2.5, "speedup_vs_peft_matched": 1.4,
                                           "memory_ratio_vs_peft": 0.4, "memory_ratio_vs_peft_matched": 0.5}
    text = benchmark_tables(results)
    assert "**2.50**" in text and text.rstrip().endswith("### GPU\n\nnot measured")


def test_the_speed_table_sets_ours_beside_theirs_and_says_what_no_gpu_has_measured():
    def pair(theirs, rate, **more):
        return {"ours": cells(1, 7, **{rate: 30.0}), theirs: cells(2, 9, **{rate: 15.0}), "speedup": 2.0,
                "memory_ratio": 0.5, **more}

    column = {"training": {"matched 256": pair("peft", "samples_per_second")},
              "methods": {"fp32": {"full": cells(3, 9), "lora": cells(2, 6) | {"speedup_vs_full": 1.5,
                                                                               "memory_ratio_vs_full": 0.667}}},
              "inference": {"classification default": pair("transformers", "texts_per_second"),
                            "generation default 8": pair("transformers", "tokens_per_second")}}
    lines = speed_table({"cpu": column}).splitlines()[2:]
    assert lines == [
        "| LoRA, 256 tokens, float32, the same batches; peft | 30.00 reviews/s | 15.00 reviews/s | 2.00 | 0.50 "
        "| not measured |",
        "| a step of lora, float32; of full | 2.00 s | 3.00 s | 1.50 | 0.67 | not measured |",
        "| classification, each as used by default; transformers | 30.00 reviews/s | 15.00 reviews/s | 2.00 | 0.50 "
        "| not measured |",
        "| generation, 8 at a time, each as used by default; transformers | 30.00 tokens/s | 15.00 tokens/s | 2.00 "
        "| 0.50 | not measured |"]
    assert "2.00 times as fast |" in speed_table({"cpu": column, "cuda": column}).splitlines()[2]


def test_growth_is_told_from_the_least_to_the_most_though_json_sorts_numbers_as_words():
    rows = {size: {"seconds_per_tflop": value, "seconds": 1.0, "peak_memory_bytes": 1}
            for size, value in (("1024", 3.0), ("128", 1.0), ("256", 2.0))}
    reviews = {size: {"seconds_per_review": 0.01, "share_aside": 0.005} for size in ("1024", "128")}
    column = {"machine": {"processor": "CPU", "cores": 2}, "limit": {"fp32": {"mfu": 0.8}, "bf16": {"mfu": 0.7}},
              "training": {}, "methods": {"fp32": {}}, "inference": {}, "start_up": {"seconds": 2.0},
              "growth": {"length": rows, "batch_size": rows, "reviews": reviews}}
    text = speed_section({"cpu": column})
    assert "from 128 to 1024: 1.00 to 3.00" in text and "0.50 % of the time at most" in text


def test_a_page_gets_the_section_on_speed_between_its_markers_and_nowhere_else():
    results = json.loads((ROOT / "results" / "benchmark.json").read_text())
    start = BLOCK_START.format("speed", WRITER)
    page = f"before\n{start}\nold\n{BLOCK_END}\nafter\n"
    assert write_speed(page, results) == page.replace("old", speed_section(results))
    with pytest.raises(OutputError, match=r"there is no .*benchmark\.py"):
        write_speed(f"{BLOCK_START.format('imdb', 'scripts/report.py')}\n{BLOCK_END}\n", results)


def test_the_page_with_every_figure_is_what_was_measured():
    if results_changed():
        pytest.skip("measured anew here; a whole run of scripts/benchmark/benchmark.py writes both")
    assert benchmark_tables(json.loads((ROOT / "results" / "benchmark.json").read_text())) == (
        ROOT / "results" / "benchmark.md").read_text()


def test_saving_is_what_lies_between_a_validation_and_the_next_batch(monkeypatch):
    """Making batches and saving are told apart without a function of the library's being replaced."""
    clock = 0

    def spend(seconds):
        nonlocal clock
        clock += seconds

    class Batches(list):
        def epoch(self, epoch, first=0):
            for batch in self[first:]:
                spend(1)
                yield batch

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    spent, turn = defaultdict(float), Turn.__new__(Turn)
    turn.device = torch.device("cpu")
    batches = TimedBatches(Batches(["first", "second"]), spent, turn)
    assert len(batches) == 2
    for _ in batches.epoch(0):
        spend(10)         # arithmetic
        batches.validate()
        spend(100)        # saving
    spend(10)
    batches.saved()       # the epoch's end has stopped that clock already
    assert spent == {"bucketing": 2, "saving": 200}
    batches.validate()
    spend(100)
    batches.saved()       # what follows the last validation ends with the training
    assert spent == {"bucketing": 2, "saving": 300}


def run_benchmark(*options):
    return subprocess.run([sys.executable, str(ROOT / "scripts/benchmark/benchmark.py"), *options], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_quick_run_measures_and_writes(tmp_path):
    done = run_benchmark("--quick", "--dataset", "sample", "--parts", "limit,growth", "--results-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark_quick.json").read_text())
    assert 0 < results["mfu"] == results["cpu"]["limit"]["fp32"]["mfu"]
    assert results["cpu"]["limit"]["fp32"]["lora"]["turns"] == 2
    reviews = results["cpu"]["growth"]["reviews"]
    assert list(reviews) == ["16", "32", "64"] and all(0 < row["share_aside"] < 1 for row in reviews.values())


@pytest.mark.parametrize(("options", "message"), [
    (["--parts", "speed"], "unknown part speed: use limit"), (["--rounds", "0"], "rounds must be at least 1"),
    (["--device", "tpu"], "unknown device 'tpu'")])
def test_a_bad_request_is_one_line(tmp_path, options, message):
    done = run_benchmark(*options, "--dataset", "sample", "--results-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr
