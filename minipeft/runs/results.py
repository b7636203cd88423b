"""From results files to tables, and into the Markdown files that show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minipeft.data.datasets import NAMED
from minipeft.errors import ConfigError, NothingToWriteError, OutputError
from minipeft.files import read_json_file, write_text_file
from minipeft.tasks import task_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a script writes into a Markdown file stands between these: the first names its subject (a dataset, several of
# them, a method on all, speed) and the script.
BLOCK_START, BLOCK_END = "<!-- results on {}: written by {} -->", "<!-- end of results -->"
WRITER = "scripts/report.py"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """A table in Markdown; `figures` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if figures else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def blank_figure(width: float, height: float, **more: Any) -> Figure:
    """A matplotlib figure of so many inches, without the state that pyplot keeps.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'minipeft[plots]'") from error
    return Figure(figsize=(width, height), **more)


class Metric(NamedTuple):
    """How a table shows a metric: its key in a results file, its heading, and whether it is a share, shown in %."""

    key: str
    heading: str
    share: bool

    def shown(self, *values: float) -> str:
        """One value, or several with "to" between them."""
        return " to ".join(f"{100 * value if self.share else value:.2f}" for value in values) + " %" * self.share


# The metrics of each task that a table shows, the first one with its interval.
METRICS = {
    "classification": (Metric("accuracy", "test accuracy", True), Metric("f1", "F1", True)),
    "tagging": (Metric("f1", "entity F1", True), Metric("precision", "precision", True),
                Metric("recall", "recall", True)),
    "summarization": (Metric("rougeL", "ROUGE-L", False), Metric("rouge1", "ROUGE-1", False),
                      Metric("rouge2", "ROUGE-2", False)),
    "translation": (Metric("bleu", "BLEU", False), Metric("chrf", "chrF", False))}
MACRO_F1 = Metric("macro_f1", "macro F1", True)
BASELINES = {
    "untrained_head": "untrained head", "zero_shot": "zero-shot by prompt", "untrained_base": "base, untrained",
    "most_frequent_tag": "each word's most frequent tag", "most_frequent_label": "always the most frequent label",
    "lead_1": "first sentence (lead-1)", "copy_source": "copy of the source",
    "word_dictionary": "word-by-word dictionary"}
# Baselines that need the training examples.
COUNTED_ON_TRAIN = ("most_frequent_label", "most_frequent_tag", "word_dictionary")
# What every results file has.
WRITTEN = {"method", "dataset", "base_model", "metrics", "parameters", "seconds"}


class Test(NamedTuple):
    """A row of a table: what was tested, its metrics, and from how many examples it was made."""

    name: str
    metrics: dict[str, Any]
    examples: int
    results: dict[str, Any]
    trained: bool


def results_table(folder: Path, dataset: str = "imdb") -> str:
    """A Markdown table of every results file about `dataset` in `folder`, baselines first, then from worse to better.

    Raises:
        OutputError: there is none, or they are about different datasets of that name.
    """
    return table_of(_results(folder, dataset))


def datasets_in(folder: Path) -> list[str]:
    """The datasets that `folder` holds results on.

    Raises:
        OutputError: there are no results.
    """
    found = {results["dataset"].get("name", "") for results in _written_in(folder)}
    if not found:
        raise OutputError(f"{folder} holds no results: train first, or name a folder with --results-dir")
    return sorted(found)


def _written_in(folder: Path) -> list[dict[str, Any]]:
    """What the results files of a folder hold. Files of others that are called like one are left out."""
    files = [read_json_file(path) for path in sorted(folder.glob("*_results.json"))]
    return [results for results in files if results.keys() >= WRITTEN and isinstance(results["dataset"], dict)]


def shown_parameters(trained: int, share: float) -> str:
    """How many parameters are trained, and their share of all."""
    return f"{trained:,} ({100 * share:.2f} %)"


def table_of(files: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of results on one dataset: `files` is what their files hold."""
    tests = [test for results in files for test in _tests_in(results)]
    dataset, (first, *others) = files[0]["dataset"]["name"], _metrics_of(tests[0].results)
    if dataset not in NAMED and all("macro_f1" in test.metrics for test in tests):
        others = [MACRO_F1]  # F1 of one label of two would be the frequent one's, as often as not
    tests.sort(key=lambda test: (test.trained, test.metrics[first.key]))
    examples = "reviews" if dataset == "imdb" else "examples"
    header = ["method", "base", "trained parameters", f"training {examples}", "epochs", first.heading, "95 % interval",
              *(metric.heading for metric in others), "training time"]
    return markdown_table(header, [_cells(test, first, others) for test in tests])


def _cells(test: Test, first: Metric, others: Sequence[Metric]) -> list[str]:
    """A row of a dataset's table."""
    results, interval = test.results, test.metrics.get(f"{first.key}_95_interval")
    trainable, total = (results["parameters"][key] for key in ("trainable", "total"))
    return [test.name, results["base_model"]["name"],
            shown_parameters(trainable, trainable / total) if trainable else "0", f"{test.examples:,}",
            str(results["training_config"]["epochs"]) if test.trained else "-",
            first.shown(test.metrics[first.key]), first.shown(*interval) if interval else "-",
            *(metric.shown(test.metrics[metric.key]) for metric in others), _time(results["seconds"])]


def _time(seconds: dict[str, float]) -> str:
    """How long a run trained: on one core, on a machine busy with other things too; else on the wall."""
    if seconds.get("train_on_cores"):
        return f"{seconds['train_on_cores'] / 60:.1f} core minutes"
    return f"{seconds['train'] / 60:.1f} min" if seconds.get("train") else "-"


def overview_table(folder: Path, datasets: Sequence[str]) -> str:
    """A Markdown table of each method's first metric on each of `datasets`, a column each, and of the baselines'.

    Raises:
        OutputError: there are no results on one of them.
    """
    columns: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    tests = [test for dataset in datasets for results in _results(folder, dataset) for test in _tests_in(results)]
    for test in tests:
        dataset, metric = test.results["dataset"]["name"], _metrics_of(test.results)[0]
        columns[dataset] = f"{dataset}: {metric.heading}"
        cells.setdefault(test.name, {})[dataset] = metric.shown(test.metrics[metric.key])
    tests.sort(key=lambda test: (test.trained, -test.results["parameters"]["trainable"], test.name))
    return markdown_table(["method", *columns.values()],
                          [[name, *(cells[name].get(dataset, "-") for dataset in columns)]
                           for name in dict.fromkeys(test.name for test in tests)], figures=True)


def _results(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """What the results files on a dataset hold.

    Raises:
        OutputError: there is none, or they are about different contents of that name.
    """
    found = [results for results in _written_in(folder) if results["dataset"].get("name") == dataset]
    if not found:
        raise OutputError(f"{folder} holds no results on {dataset}")
    contents = [results["request"]["dataset"]["fingerprints"] for results in found if "request" in results]
    if any(content != contents[0] for content in contents):
        raise OutputError(f"{folder} holds results on different contents called {dataset}, which no table can compare: "
                          "give each a --results-dir of its own")
    return found


def _tests_in(results: dict[str, Any]) -> list[Test]:
    """What one results file tested: a method, or several baselines."""
    examples = results["dataset"]["sizes"]["train"]
    if results["method"] != "baseline":
        return [Test(results["method"], results["metrics"]["test"], examples, results, trained=True)]
    return [Test(f"baseline: {BASELINES.get(key, key)}", metrics, examples if key in COUNTED_ON_TRAIN else 0, results,
                 trained=False) for key, metrics in results["metrics"].items()]


def _metrics_of(results: dict[str, Any]) -> tuple[Metric, ...]:
    """What a table shows of a results file; of a user's own task its headline."""
    headline = results.get("headline", "accuracy")
    return METRICS.get(task_name(results.get("task", "classification")), (Metric(headline, headline, False),))


# --- tables in Markdown files -----------------------------------------------------------------------------------------

def results_block(subject: str, folder: Path) -> str:
    """The table of a dataset, or of several with ", " between, from the results in `folder`.

    Raises:
        OutputError: there are no results on one.
    """
    datasets = subject.split(", ")
    return overview_table(folder, datasets) if len(datasets) > 1 else results_table(folder, subject)


def replace_blocks(text: str, script: str, block: Callable[[str], str],
                   markers: tuple[str, str] = (BLOCK_START, BLOCK_END)) -> str:
    """`text` with everything that a script writes into it, each time between two markers, made anew.

    Args:
        text: of a Markdown file. What other scripts write into it stays as it is.
        script: its name in the markers.
        block: from a marker's subject to what is to follow the marker.
        markers: the two that it stands between.

    Raises:
        NothingToWriteError: there is no marker of this script.
        OutputError: a marker has no end.
    """
    (marker_start, marker_end), replaced = markers, False
    start, written_by, behind = marker_start.split("{}")
    parts = text.split(start)
    for number, part in enumerate(parts[1:], start=1):
        marker, _, rest = part.partition("\n")
        subject, _, writer = marker.removesuffix(behind).partition(written_by)
        _, end, after = rest.partition(marker_end)
        if not marker.endswith(behind) or not end:
            raise OutputError(f"{start}{marker} is not followed by {marker_end}")
        if writer == script:
            parts[number], replaced = f"{marker}\n{block(subject)}\n{end}{after}", True
    if not replaced:
        raise NothingToWriteError(f"there is no {marker_start.format('...', script)} ... {marker_end} to write between")
    return start.join(parts)


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Write a file anew with what `change` makes of its text.

    Raises:
        OutputError: there is no such file, or it cannot be written.
    """
    if not path.is_file():
        raise OutputError(f"there is no file {path} to write into")
    write_text_file(path, change(path.read_text(encoding="utf-8")))
