"""Test a saved adapter (or a fully fine-tuned model) on a dataset's test split:

    python scripts/evaluate.py --adapter checkpoints/lora_finetuned
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import add_data_options, add_machine_options, run

from minipeft import defaults
from minipeft.data import choose_dataset, load_dataset
from minipeft.errors import ConfigError, DataError
from minipeft.files import check_writable, write_json_file
from minipeft.hardware import choose_device, choose_precision
from minipeft.saved import load_finetuned
from minipeft.tasks.classification import encode, metrics, predict_logits


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
    model, tokenizer, details = load_finetuned(options.adapter, options.model, device)
    name, why = (options.dataset, "asked for") if options.dataset is not None else choose_dataset(options.data_dir)
    print(f"dataset    {name} ({why})")
    data = load_dataset(name, options.data_dir, options.text_column, options.label_column)
    if options.json:
        check_writable(options.json.parent)
    if len(data.label_names) != len(details["label_names"]):
        raise DataError(f"{name} has the labels {', '.join(data.label_names)}, but {options.adapter} was trained for "
                        f"{', '.join(details['label_names'])}")
    if options.test_size is not None and options.test_size < 1:
        raise ConfigError(f"test_size must be at least 1, got {options.test_size}")
    small = device.type == "cpu" and not options.full
    test = data.test.subset(options.test_size or (defaults.CPU_TEST_SIZE if small else None), seed=0)
    ids = encode(test.texts, tokenizer, details["max_length"], details["truncation"])
    logits = predict_logits(model, ids, device, precision, progress="testing")
    found = metrics(logits, test.labels)
    low, high = found["accuracy_95_interval"]
    more = " (--full takes all)" if len(test) < len(data.test) else ""
    print(f"{name}, {len(test):,} of {len(data.test):,} test examples{more}")
    print(f"accuracy {found['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})   F1 {found['f1']:.4f}   "
          f"loss {found['loss']:.4f}")
    width = max(len(label) for label in data.label_names) + 2
    print(f"{'true / predicted':>{width + 10}}" + "".join(f"{label:>{width}}" for label in data.label_names))
    for label, row in zip(data.label_names, found["confusion_matrix"]):
        print(f"{label:>{width + 10}}" + "".join(f"{count:>{width},}" for count in row))
    if options.json:
        write_json_file(options.json, {"adapter": str(options.adapter), "dataset": name, "metrics": found})


if __name__ == "__main__":
    run(main)
