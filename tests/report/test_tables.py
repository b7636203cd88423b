"""tables.py: what scripts/report.py writes into Markdown files from comparison.json."""

from __future__ import annotations

import copy

import pytest

from minipeft.errors import OutputError
from minipeft.files import write_json_file
from minipeft.report import tables
from minipeft.report.tables import ELSEWHERE, Comparison, block, costs, read_comparison, replace_tables
from minipeft.runs.results import BLOCK_END, BLOCK_START, WRITER


def names(table):
    return [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]


def test_a_datasets_table_has_outside_figures_then_baselines_then_methods_from_worse_to_better(results):
    table = block("imdb compared", Comparison(results))
    assert names(table) == [*(name for name, _ in ELSEWHERE["imdb"]), "zero-shot by prompt", "head", "prompt",
                            "ptuning", "prefix", "bitfit", "ia3", "vera", "adapter", "dora", "lora", "full"]
    assert "91.88 %" in table and all("reported elsewhere" in name for name, _ in ELSEWHERE["imdb"])
    assert names(block("films compared", Comparison(results)))[0] == "zero-shot by prompt"


def test_a_dataset_with_baselines_alone_is_not_shown_yet(comparison, tmp_path):
    less = copy.deepcopy(comparison)
    less["datasets"]["imdb"]["methods"] = {}
    write_json_file(tmp_path / "comparison.json", less)
    assert list(read_comparison(tmp_path)[0]["datasets"]) == ["films"]
    less["datasets"]["films"]["methods"] = {}
    write_json_file(tmp_path / "comparison.json", less)
    with pytest.raises(OutputError, match=r"comparison\.json holds baselines alone: compare some methods"):
        read_comparison(tmp_path)


@pytest.mark.parametrize("file", ["comparison.json", "comparison_tuning.json"])
@pytest.mark.parametrize("content", [{}, {"datasets": []}, {"datasets": {"x": {}}}, {"datasets": {"x": 1}}], ids=str)
def test_a_file_that_is_no_comparison_is_refused(comparison, tmp_path, file, content):
    write_json_file(tmp_path / "comparison.json", comparison)
    write_json_file(tmp_path / file, content)
    with pytest.raises(OutputError, match=f"{file} holds no comparison: make it anew by scripts/compare.py"):
        read_comparison(tmp_path)


def test_what_had_no_common_budget_is_in_a_table_of_its_own(results):
    assert names(block("imdb without the budget", Comparison(results))) == ["lora, best without the budget"]


def test_in_short_are_five_rows(results):
    table = block("imdb in short", Comparison(results))
    assert names(table) == ["baseline: zero-shot by prompt", "prompt (20 tokens)", "adapter (reduction 8)",
                            "lora (r 8)", "full"]
    assert "| full | 7,000,000 (100.00 %) | 3 | 94.50 % ± 0.50 % |" in table


def test_what_a_method_costs_is_a_table_of_its_own_the_fastest_first(results):
    head, _, *rows = block("imdb costs", Comparison(results)).splitlines()
    assert names(block("imdb costs", Comparison(results))) == [
        "prefix (20 tokens)", "ptuning (20 tokens)", "prompt (20 tokens)", "head", "bitfit", "ia3",
        "adapter (reduction 8)", "vera (r 64)", "dora (r 8)", "lora (r 8)", "full"]
    assert head == ("| method | core s per 1,000 examples | MiB that training adds | adapter, kB | extra inference | "
                    "merged | merges | forgotten, nats |")
    assert rows[-1] == "| full | 31.0 ± 1.0 | 20 ± 0 | 0 | +25 % | +0 % | yes | +0.500 ± 0.000 |"


def test_what_was_not_timed_comes_last(comparison):
    content = copy.deepcopy(comparison["datasets"]["imdb"])
    content["methods"]["prefix"]["core_seconds_per_1000_examples"]["mean"] = None
    lines = costs("imdb", content).splitlines()
    assert lines[2].startswith("| ptuning ") and lines[-1].startswith("| prefix (20 tokens) | - |")


def test_a_column_for_each_number_of_examples_and_none_where_there_were_no_such_runs(results):
    assert block("imdb by examples", Comparison(results)).splitlines() == [
        "| method | 16 | 32 | 64 |", "| --- | ---: | ---: | ---: |",
        "| head | 66.60 % | 69.50 % ± 0.50 % | 71.40 % |", "| lora | 61.60 % | 93.50 % ± 0.50 % | 66.40 % |"]
    with pytest.raises(OutputError, match=r"no runs on fewer examples of films: scripts/compare\.py --few-examples"):
        block("films by examples", Comparison(results))


def test_a_methods_chapter_has_it_beside_the_best_baseline_and_full_on_every_dataset(results):
    table, reading = block("all datasets by lora", Comparison(results)).split("\n\n")
    head, _, films, imdb = table.splitlines()
    assert head == "| dataset | best without training | full; rank | lora; rank |"
    assert films.startswith("| films: accuracy | zero-shot by prompt: 60.00 % | 94.50 % ± 0.50 %; 1 to ")
    assert imdb.startswith("| imdb: accuracy |") and " | 93.50 % ± 0.50 %; 1 to " in imdb
    assert reading.startswith('Means over seeds ± their standard deviation; rank "2 to 4" is second, third or')
    assert block("all datasets by full", Comparison(results)).startswith(
        "| dataset | best without training | full; rank |\n")
    with pytest.raises(OutputError, match="the comparison has no lara: its methods are adapter, "):
        block("all datasets by lara", Comparison(results))


def test_where_a_method_was_not_compared_or_no_baseline_tested_the_chapter_has_a_dash(comparison, tmp_path):
    less = copy.deepcopy(comparison)
    del less["datasets"]["imdb"]["methods"]["lora"]
    less["datasets"]["imdb"]["baselines"] = {}
    write_json_file(tmp_path / "comparison.json", less)
    imdb = block("all datasets by lora", Comparison(tmp_path)).splitlines()[3]
    assert imdb.startswith("| imdb: accuracy | - | 94.50 %") and imdb.endswith(" | - |")


def test_the_overview_has_a_column_for_each_dataset_with_means_deviations_and_ranks(results):
    head, _, *rows = block("all datasets", Comparison(results)).splitlines()
    assert head == "| method | films: accuracy; rank | imdb: accuracy; rank |"
    assert rows[0].startswith("| full | 94.50 % ± 0.50 %; 1 to ")


def test_other_subjects_are_left_to_others_and_unknown_datasets_are_refused(results):
    assert block("imdb", Comparison(results)) is None
    with pytest.raises(OutputError, match=r"holds nothing on 'sst2': its datasets are films, imdb"):
        block("sst2 compared", Comparison(results))


def test_a_page_with_several_tables_reads_the_comparison_once(results, monkeypatch):
    read, files = tables.read_json_file, []
    monkeypatch.setattr(tables, "read_json_file", lambda file: files.append(file.name) or read(file))
    start, end = BLOCK_START.format("{}", WRITER), BLOCK_END
    subjects = ("findings", "all datasets", "imdb costs")
    replace_tables("".join(f"{start.format(subject)}\n{end}\n" for subject in subjects), results)
    assert files == ["comparison.json", "comparison_tuning.json"]


def test_without_a_comparison_one_line_says_how_to_make_one(tmp_path):
    with pytest.raises(OutputError, match=r"holds no comparison\.json: run scripts/compare\.py"):
        replace_tables("<!-- results on findings: written by scripts/report.py -->\n<!-- end of results -->", tmp_path)
