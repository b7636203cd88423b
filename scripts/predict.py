"""Label texts with a trained adapter; texts come from the command line or, one a line, from standard input:

    python scripts/predict.py "A film I will not forget." "Two hours I want back."
    cat reviews.txt | python scripts/predict.py --adapter checkpoints/lora_finetuned
"""

from __future__ import annotations

import argparse
import sys

from common import add_machine_options, run

from minipeft.data import check_texts, clean
from minipeft.errors import DataError
from minipeft.hardware import choose_device, choose_precision
from minipeft.saved import load_finetuned
from minipeft.tasks.classification import encode, predict_logits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to predict")
    what.add_argument("texts", nargs="*", metavar="TEXT", help="texts to label; without any, lines of standard input")
    what.add_argument("--adapter", default="checkpoints/lora_finetuned", help="folder that training wrote; default "
                                                                              "checkpoints/lora_finetuned")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not options.texts and sys.stdin.isatty():
        raise DataError("no text: give texts as arguments, or lines on standard input")
    try:
        texts = options.texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
    check_texts(texts, "argument" if options.texts else "standard input")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    model, tokenizer, details = load_finetuned(options.adapter, options.model, device)
    ids = encode([clean(text) for text in texts], tokenizer, details["max_length"], details["truncation"])
    probabilities = predict_logits(model, ids, device, precision).softmax(dim=1)          # (N, K)
    for text, row in zip(texts, probabilities):
        label = int(row.argmax())
        print(f"{details['label_names'][label]}\t{row[label]:.4f}\t{' '.join(text.split())[:80]}")


if __name__ == "__main__":
    run(main)
