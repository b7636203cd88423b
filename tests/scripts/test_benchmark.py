"""The benchmark: who takes turns, on which texts, and what the report says; one part of it run for real."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from aims import AIMS, aims_table
from documents import results_changed
from equal_terms import full_texts, rows_of_same_micro_batches
from helpers import ROOT
from job import Turn, read_batches
from labels import equal_label
from page import benchmark_tables
from parts import Benchmark
from picture import draw_benchmark
from profiled import by_operator
from tables import WRITER, before_and_after, benchmark_headline, speed_section, speed_table, write_speed
from training_sides import TimedBatches
from turns import take_turns

from minipeft.errors import OutputError
from minipeft.model.linear import onednn_multiplies
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


def test_texts_of_equal_terms_are_all_full_and_cut_into_the_same_micro_batches(material):
    job = full_texts(material, material.ids, 3, 64)
    ids, _, plan = read_batches(job)
    assert {len(row) for row in ids} == {64}
    assert len(plan) == 3 and all(len(rows) == material.batch_size for rows in plan)
    material.options.quick, material.batch_size = False, 16
    material.config.n_embd = 768
    assert [material.micro_batch_size(length) for length in (256, 512)] == [4, 2]


def test_without_dropout_only_the_shorter_texts_are_measured():
    rows = rows_of_same_micro_batches((256, 512))
    assert len(rows) == 6
    assert ("bf16", 256, 0.0) in rows and ("bf16", 512, 0.1) in rows and ("bf16", 512, 0.0) not in rows


def cells(seconds, memory, **more):
    return {"seconds": seconds, "seconds_low": seconds, "seconds_high": seconds, "peak_memory_bytes": memory,
            "samples_per_second": 1 / seconds, "mean_loss": 0.7, **more}


def against_peft(speedup, memory_ratio):
    return {"ours": cells(1, 2**30), "peft": cells(speedup, 2**31), "speedup": speedup, "memory_ratio": memory_ratio}


def step_profile(*operators):
    rows = [{"name": name, "calls": 4, "seconds": seconds, "share": seconds} for name, seconds in operators]
    return {"operators": rows, "copies": {"calls": 1234, "seconds": 0.3}, "casts": {"calls": 5, "seconds": 0.2},
            "self_seconds": 1.0, "texts": 16, "tokens": 256}


@pytest.fixture
def column():
    """What a device has measured: every part that has rows of its own kind, before the work on speed and after it."""
    def kept(before, after):
        return {"before": {"commit": "aaa", "rows": before}, "after": {"commit": "bbb", "rows": after}}

    def pair(rate):
        return {"ours": cells(1, 7, **{rate: 30.0}), "transformers": cells(2, 9, **{rate: 15.0}), "speedup": 2.0,
                "memory_ratio": 0.5}

    mini = {"lora": cells(4, 2**30), "full": cells(6, 2**31), "speedup": 1.5, "memory_ratio": 0.5, "steps": 2}
    of_a_method = {"trained_parameters": 1, "optimiser_state_bytes": 8, "saved_bytes": 4}
    rates = {"achieved_flops": 1e9, "products_flops": 2e9}
    growth = {size: cells(1, 7, seconds_per_tflop=value) for size, value in (("1024", 3.0), ("128", 1.0), ("256", 2.0))}
    return {
        "machine": {"processor": "P", "cores": 2, "gpu": "G"}, "batch_size": 16,
        "model": {"parameters": 124e6, "weights": "random"},
        "training": {f"{row} {length}": against_peft(speedup, ratio) for row, length, speedup, ratio in (
            ("default", 256, 3.0, 0.3), ("default", 512, 2.5, 0.4), ("matched", 256, 1.4, 0.5),
            ("matched", 512, 1.6, 0.35))},
        "same_micro_batches": kept(
            {"fp32 256 0.1": against_peft(1.0, 0.7)},
            {"fp32 256 0.0": against_peft(1.1, 0.9), "fp32 256 0.1": against_peft(1.3, 0.5),
             "fp32 512 0.1": against_peft(1.2, 0.4), "bf16 256 0.1": against_peft(1.6, 0.6)}),
        "language_model": kept({}, {"fp32": against_peft(1.2, 0.3), "bf16": against_peft(1.4, 0.2)}),
        "mini": kept({}, {"fp32": mini, "bf16": mini | {"speedup": 1.4}}),
        "profile": kept({"mini fp32": step_profile(("mm", 0.6), ("gone", 0.1))},
                        {"mini fp32": step_profile(("mm", 0.7), ("new", 0.2))}),
        "methods": {"fp32": {"full": cells(3, 9, **of_a_method), "lora": cells(
            2, 6, speedup_vs_full=1.5, memory_ratio_vs_full=0.667, **of_a_method)}},
        "inference": {"classification default": pair("texts_per_second"),
                      "generation matched 1": pair("tokens_per_second"),
                      "generation matched 8": pair("tokens_per_second") | {"speedup": 1.9}},
        "limit": {"fp32": {"mfu": 0.8, **rates}, "bf16": {"mfu": 0.7, **rates}}, "start_up": {"seconds": 2.0},
        "growth": {"length": growth, "batch_size": growth, "reviews": {
            size: cells(1, 7, seconds_per_review=0.01, share_aside=0.005, tokenising=0.0, bucketing=0.0, saving=0.0)
            for size in ("1024", "128")}}}


def test_the_headline_takes_the_worse_of_two_lengths_and_of_two_precisions(column):
    assert benchmark_headline({"cpu": column}) == {
        "speedup_vs_peft": 2.5, "speedup_vs_peft_matched": 1.4, "memory_ratio_vs_peft": 0.4,
        "memory_ratio_vs_peft_matched": 0.5, "speedup_vs_peft_same_microbatches": 1.2,
        "speedup_vs_peft_same_microbatches_bf16": 1.6, "memory_vs_peft_same_microbatches": 0.6,
        "mini_lora_speedup_vs_full": {"fp32": 1.5, "bf16": 1.4}, "lm_memory_vs_peft": 0.3, "lm_speedup_vs_peft": 1.2,
        "generation_speedup_matched": 1.9, "generation_speedup_fp32": 2.0, "length_growth": 3.0, "mfu": 0.8,
        "lora_speedup_vs_full": 1.5, "lora_memory_ratio_vs_full": 0.667, "start_up_seconds": 2.0}


def test_what_was_measured_before_the_work_on_speed_is_no_headline(column):
    column["same_micro_batches"].pop("after")
    assert "speedup_vs_peft_same_microbatches" not in benchmark_headline({"cpu": column})


def test_the_speed_table_sets_ours_beside_theirs_and_says_what_differs(column):
    lines = speed_table(column).splitlines()
    assert len(lines) == 2 + 4 + 4 + 2 + 2 + 1 + 3
    for line in (
            "| LoRA, 256 tokens, float32: same batches, only ours in micro-batches; peft | 1.00 reviews/s "
            "| 0.71 reviews/s | 1.40 | 0.50 |",
            "| LoRA, 512 tokens, float32: same micro-batches, each library's own dropout 0.1; peft | 1.00 reviews/s "
            "| 0.83 reviews/s | 1.20 | 0.40 |",
            "| a step of LoRA on all linear layers of mini, float32: same micro-batches; full | 2.00 s | 3.00 s | 1.50 "
            "| 0.50 |",
            "| a step of lora, float32: same micro-batches; full | 2.00 s | 3.00 s | 1.50 | 0.67 |",
            "| generation, 8 at a time, float32: same batches; transformers | 30.00 tokens/s | 15.00 tokens/s | 1.90 "
            "| 0.50 |"):
        assert line in lines


def test_rows_before_and_after_stand_side_by_side_and_name_their_commits(column):
    text = before_and_after(column)
    row = equal_label("same_micro_batches", "fp32 256 0.1")
    assert f"| {row} | 1.00 | 1.30 | 0.70 | 0.50 |" in text.splitlines()
    assert f"| {row.replace('256', '512')} |  | 1.20 |  | 0.40 |" in text.splitlines()
    assert "before: aaa, after: bbb" in text
    assert before_and_after({}) == ""


def test_a_gpu_has_a_table_where_one_measured_and_else_none(column):
    for write in (benchmark_tables, speed_section):
        assert "GPU" not in write({"cpu": column})
        assert "GPU" in write({"cpu": column, "cuda": column})


def test_the_page_has_the_profile_of_both_times(column):
    lines = benchmark_tables({"cpu": column}).splitlines()
    assert "| `mm` | 4 | 0.600 | 60.0 % | 4 | 0.700 | 70.0 % |" in lines
    assert "| `gone` | 4 | 0.100 | 10.0 % | - | - | - |" in lines
    assert "| `new` | - | - | - | 4 | 0.200 | 20.0 % |" in lines
    assert "| copies in all | 1,234 | 0.300 |  | 1,234 | 0.300 |  |" in lines


def test_the_picture_has_bars_for_every_row_that_was_measured(column, tmp_path):
    pytest.importorskip("matplotlib")
    draw_benchmark({"cpu": column}, tmp_path / "with.png")
    del column["same_micro_batches"]
    draw_benchmark({"cpu": column}, tmp_path / "without.png")
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size > 0


def test_copies_casts_and_the_longest_operators_are_counted():
    x = torch.randn(200, 200)
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            x @ x
        x.to(torch.bfloat16)
        x.t().contiguous()
    found = by_operator(profiler.key_averages())
    assert found["casts"]["calls"] == 1 and found["copies"]["calls"] == 2
    operators = {row["name"]: row for row in found["operators"]}
    assert operators["aten::mm"]["calls"] == 3
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1, abs=0.01)


def test_growth_is_told_from_the_least_to_the_most_though_json_sorts_numbers_as_words(column):
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


def run_benchmark(*options, script="benchmark.py", timeout=300):
    return subprocess.run([sys.executable, str(ROOT / "scripts/benchmark" / script), *options], capture_output=True,
                          text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_quick_run_measures_and_writes(tmp_path):
    done = run_benchmark("--quick", "--dataset", "sample", "--parts", "limit,growth", "--results-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark_quick.json").read_text())
    assert 0 < results["mfu"] == results["cpu"]["limit"]["fp32"]["mfu"]
    limit = results["cpu"]["limit"]["fp32"]
    assert limit["lora"]["turns"] == 2 and limit["products_flops"] == max(limit["products_flops_by"].values())
    reviews = results["cpu"]["growth"]["reviews"]
    assert list(reviews) == ["16", "32", "64"] and all(0 < row["share_aside"] < 1 for row in reviews.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="compares with peft")
def test_a_quick_run_on_equal_terms_trains_as_peft_does_and_keeps_before_and_after(tmp_path):
    parts = "same_micro_batches,mini,language_model,profile"
    for options in (["--parts", parts], ["--parts", "profile", "--before", "--only", "tiny bf16"]):
        done = run_benchmark("--quick", "--dataset", "sample", "--results-dir", str(tmp_path), *options, timeout=900)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark_quick.json").read_text())
    column = results["cpu"]
    assert [*column["profile"]["before"]["rows"]] == ["tiny bf16"] and column["profile"]["before"]["commit"]
    rows = column["same_micro_batches"]["after"]["rows"]
    assert len(rows) == 4
    ours, peft = (rows["fp32 32 0.0"][side] for side in ("ours", "peft"))
    assert ours["mean_loss"] == pytest.approx(peft["mean_loss"], abs=1e-4)
    assert ours["trained_parameters"] == peft["trained_parameters"]
    for row in column["language_model"]["after"]["rows"].values():
        assert row["ours"]["mean_loss"] == pytest.approx(row["peft"]["mean_loss"], abs=0.05)
    for row in column["profile"]["after"]["rows"].values():
        products = {"aten::mm", "mkldnn::_linear_pointwise"}
        assert row["copies"]["calls"] and products & {operator["name"] for operator in row["operators"]}
    assert {"bf16", "fp32"} == set(results["mini_lora_speedup_vs_full"])
    assert {"speedup_vs_peft_same_microbatches", "speedup_vs_peft_same_microbatches_bf16", "lm_memory_vs_peft",
            "memory_vs_peft_same_microbatches"} < set(results)


def test_what_was_tried_stands_beside_what_is_used(tmp_path):
    page = tmp_path / "notes.md"
    done = run_benchmark("--turns", "1", "--output", str(page), script="tried.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    compared = {what for what, *_ in rows}
    used = [what for what, way, *_ in rows if way.startswith("**")]
    assert len(compared) == len(used) == len(set(used)) >= 9 + onednn_multiplies(torch.bfloat16)
    assert all(float(milliseconds) > 0 for _, _, milliseconds, _ in rows)
    done = run_benchmark("--turns", "0", "--output", str(page), script="tried.py")
    assert done.returncode == 2 and done.stderr == "error: turns must be at least 1, got 0\n"


@pytest.mark.parametrize(("options", "message"), [
    (["--parts", "speed"], "unknown part speed: use limit"),
    (["--before", "--parts", "limit"], "--before is not kept of limit"),
    (["--rounds", "0"], "rounds must be at least 1"), (["--device", "tpu"], "unknown device 'tpu'")])
def test_a_bad_request_is_one_line(tmp_path, options, message):
    done = run_benchmark(*options, "--dataset", "sample", "--results-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_a_bar_that_is_missed_says_by_how_much_and_why():
    table = aims_table({"length_growth": 1.21, "lm_memory_vs_peft": 0.5,
                        "mini_lora_speedup_vs_full": {"bf16": 1.1, "fp32": 1.25}})
    lines = table.splitlines()
    assert [line.split(" | ")[-1] for line in lines[2:6]] == ["no, by 0.20 |", "yes |", "yes |", "no, by 0.13 |"]
    reasons = [line for line in lines[6:] if line]
    assert len(reasons) == 2 and reasons[0].startswith("mini, bfloat16: LoRA's step, times as fast as full's: What")
    assert aims_table({}) == ""


def test_every_bar_is_of_a_figure_that_was_measured_and_what_is_missed_has_a_reason():
    results = json.loads((ROOT / "results" / "benchmark.json").read_text())
    table = aims_table(results)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(AIMS) + 2
    assert not [line for line in table.splitlines() if line.endswith(": ")]
