"""Test a saved adapter (or a fully fine-tuned model) on a dataset's test split:

    python scripts/evaluate.py --adapter checkpoints/lora_finetuned
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.data.datasets import KNOWN, choose_dataset, load_dataset
from minipeft.errors import ConfigError, DataError
from minipeft.files import check_writable, write_json_file
from minipeft.methods.saving import read_details
from minipeft.runs import defaults
from minipeft.runs.command_line import add_data_options, add_machine_options, run
from minipeft.runs.finetune import headline
from minipeft.runs.trained import load_finetuned
from minipeft.training.hardware import cast_frozen, choose_device, choose_precision


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to test")
    what.add_argument("--adapter", default="checkpoints/lora_finetuned", help="folder that training wrote; default "
                                                                              "checkpoints/lora_finetuned")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    what.add_argument("--test-size", type=int, help="use only so many test examples")
    what.add_argument("--json", type=Path, help="also write the metrics to this file")
    add_data_options(parser)
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    model, task = load_finetuned(options.adapter, options.model, device, options.task)
    cast_frozen(model.requires_grad_(False), precision)
    trained_on = read_details(options.adapter).get("dataset")
    if options.dataset is not None:
        name, why = options.dataset, "asked for"
    elif trained_on in (*KNOWN, "sample"):
        name, why = trained_on, "which the model was trained on"
    elif task.name != "classification":
        raise DataError(f"{options.adapter} was trained on {trained_on}, a file of your own: name it with --dataset")
    else:
        name, why = choose_dataset(options.data_dir)
    print(f"dataset    {name} ({why})")
    data = load_dataset(name, options.data_dir, options.text_column, options.label_column,
                        task=options.task or task.name, label_names=task.label_names or None)
    task.check_installed()
    if options.json:
        check_writable(options.json.parent)
    if data.label_names != task.label_names:
        raise DataError(f"{name} has the labels {', '.join(data.label_names)}, but {options.adapter} was trained for "
                        f"{', '.join(task.label_names)}")
    if options.test_size is not None and options.test_size < 1:
        raise ConfigError(f"test_size must be at least 1, got {options.test_size}")
    small = device.type == "cpu" and not options.full
    test = data.test.subset(options.test_size or (defaults.CPU_TEST_SIZE if small else None), seed=0)
    found = task.test(model, test, device, precision, progress="testing")
    more = " (--full takes all)" if len(test) < len(data.test) else ""
    print(f"{name}, {len(test):,} of {len(data.test):,} test examples{more}")
    print(headline(task, found))
    print("   ".join(f"{key} {value:.4f}" for key, value in found.items() if isinstance(value, float)))
    if "confusion_matrix" in found:
        print_confusion_matrix(found["confusion_matrix"], data.label_names)
    for kind, row in found.get("by_type", {}).items():
        print(f"{kind:>20}  " + "   ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "entities")
              + f"   of {row['entities']:,}")
    if options.json:
        write_json_file(options.json, {"adapter": str(options.adapter), "dataset": name, "metrics": found})


def print_confusion_matrix(matrix: list[list[int]], label_names: list[str]) -> None:
    """Rows are true labels, columns predicted ones."""
    width = max(len(label) for label in label_names) + 2
    print(f"{'true / predicted':>{width + 10}}" + "".join(f"{label:>{width}}" for label in label_names))
    for label, row in zip(label_names, matrix):
        print(f"{label:>{width + 10}}" + "".join(f"{count:>{width},}" for count in row))


if __name__ == "__main__":
    run(main)
