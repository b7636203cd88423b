"""Pretrain the bundled base model `mini` on IMDb's train and unsupervised reviews. Run again, it goes on.

    python scripts/pretraining/pretrain.py --data-dir ../shared/data
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe import PackedWindows, PretrainingConfig, bits_per_byte, pretrain, validation_loss
from vocabulary import train_vocabulary

import minipeft
from minipeft.commands.options import add_dataclass_options, given
from minipeft.commands.start import run
from minipeft.data.datasets import data_folder, read_parquet_split, stratified_split
from minipeft.data.examples import clean
from minipeft.errors import DataError
from minipeft.files import check_writable, read_json_file, write_json_file
from minipeft.model import hub
from minipeft.model.gpt2 import GPT2Config, GPT2LMHeadModel
from minipeft.model.tokenizer import VOCABULARY_FILE, get_tokenizer
from minipeft.settings import POSITIVE_INTEGER, PROBABILITY, Range, Settings, setting
from minipeft.training.hardware import choose_device, commit, machine, versions
from minipeft.training.state import STATE_FILE

CONFIG_FILE = "config.json"
START_FILE = "start.json"  # beside a state or a snapshot: {"initialisation", "step", "curve", "seconds", "losses"}


@dataclass
class Size(Settings):
    """What a new model looks like."""

    n_layer: int = setting(6, "blocks", POSITIVE_INTEGER)
    n_head: int = setting(4, "attention heads", POSITIVE_INTEGER)
    n_embd: int = setting(256, "channels", POSITIVE_INTEGER)
    vocab_size: int = setting(8192, "entries, end-of-text included",
                              Range("a number from 257 to 65,536", lambda value: 257 <= value <= 2**16))
    dropout: float = setting(0.0, "for runs of several epochs; also with --init-from", PROBABILITY)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", help="folder that holds imdb/*.parquet (default: MINIPEFT_DATA)")
    where.add_argument("--output", type=Path, default=hub.MINI_FOLDER, help="model folder to write")
    where.add_argument("--state", type=Path, default=Path("checkpoints/pretraining_state"),
                       help="folder of the resumable state")
    where.add_argument("--results", type=Path, default=Path("results/pretraining_mini.json"))
    where.add_argument("--init-from", type=Path, help="start from this model folder, not at random; from a snapshot of "
                                                      "an unfinished run the run goes on, with new optimizer moments")
    add_dataclass_options(parser.add_argument_group("size (ignored with --init-from)"), Size, {})
    add_dataclass_options(parser.add_argument_group("recipe"), PretrainingConfig, {})
    machine_group = parser.add_argument_group("machine")
    machine_group.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    machine_group.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    machine_group.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def reviews(folder: Path, seed: int = 0) -> tuple[list[str], list[str]]:
    """The texts to learn from, and the held-out ones: exactly the validation split of `--dataset imdb`."""
    train, unlabelled = read_parquet_split(folder, "train"), read_parquet_split(folder, "unsupervised")
    texts = [clean(text) for text in train["text"].to_pylist()]
    kept, held_out = stratified_split(train["label"].to_pylist(), 0.1, seed)
    more = [clean(text) for text in unlabelled["text"].to_pylist()]
    return [texts[i] for i in kept] + more, [texts[i] for i in held_out]


def new_model(size: Size, window: int, init_from: Path | None) -> GPT2LMHeadModel:
    """A model at random values, or the given one, with the dropout asked for."""
    dropouts = {name: size.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if init_from:
        return GPT2LMHeadModel.from_pretrained(init_from, **dropouts)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=size.vocab_size, n_positions=window, n_embd=size.n_embd, n_layer=size.n_layer, n_head=size.n_head,
        bos_token_id=size.vocab_size - 1, eos_token_id=size.vocab_size - 1, **dropouts))


def prepare_state(folder: Path, model: GPT2LMHeadModel, texts: list[str], init_from: Path | None) -> dict[str, Any]:
    """Put beside the state what a model folder needs to go with it: the vocabulary, the sizes, and how the run began.

    Where there is a state already, the run goes on from it, and what stands beside it stays: it is of that run, whatever
    model the command names now.

    Returns:
        How it began: {"initialisation", and what `recipe.pretrain` takes}.
    """
    if (folder / STATE_FILE).is_file() and (folder / START_FILE).is_file():
        return read_json_file(folder / START_FILE)
    start = {"initialisation": init_from.name if init_from else "random", "step": 0}
    if init_from and (init_from / START_FILE).is_file():
        start = read_json_file(init_from / START_FILE)
    vocabulary = folder / VOCABULARY_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if init_from:
        shutil.copyfile(init_from / VOCABULARY_FILE, vocabulary)
    elif not vocabulary.is_file():
        print(f"training a vocabulary of {model.config.vocab_size:,} entries")
        train_vocabulary(texts, model.config.vocab_size - 1, vocabulary)
    write_json_file(folder / CONFIG_FILE, model.config.to_dict())
    write_json_file(folder / START_FILE, start)
    return start


def encode(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """The token ids of each text, by the vocabulary of a folder."""
    return [np.array(ids, dtype=np.uint16) for ids in get_tokenizer(folder).encode_batch(texts)]


def model_card(results: dict[str, Any]) -> str:
    """What the bundled model is, from what was measured while making it."""
    model, recipe, data = results["model"], results["recipe"], results["data"]
    start = ("random values" if results["initialisation"] == "random" else
             f"the checkpoint `{results['initialisation']}`, whose own tokens are not counted below and which may have "
             "seen held-out reviews")
    optimizer = f"AdamW {tuple(recipe['betas'])}"
    if recipe["muon"]:
        optimizer = f"Muon for the blocks' matrices and {optimizer} for the rest"
    return f"""# mini: the bundled base model

GPT-2's architecture at {model["n_layer"]} layers, width {model["n_embd"]}, {model["n_head"]} heads, {model["n_positions"]} positions: {model["parameters"]:,} parameters, stored as
float16 in the official layout (`config.json`, `model.safetensors`). Its vocabulary, `vocab.tiktoken`, is a byte-level BPE
of {model["vocab_size"]:,} entries in tiktoken's rank-file format, `<|endoftext|>` being the last.

- **Data**: {data["train_reviews"]:,} film reviews from the train and unsupervised parts of IMDb (Large Movie Review Dataset v1.0,
  Maas et al., ACL 2011), {data["train_tokens_per_epoch"]:,} tokens; line-break tags became line breaks. Never a test review. Held out:
  {data["held_out_reviews"]:,} train reviews, the same that `--dataset imdb` uses for validation.
- **Recipe**: `scripts/pretraining/pretrain.py`, from {start}. {results["tokens_seen"]:,} tokens, which is
  {results["tokens_seen"] / data["train_tokens_per_epoch"]:.1f} epochs, in batches of {recipe["batch_size"]} x {recipe["window"]}, {optimizer},
  weight decay {recipe["weight_decay"]} on matrices, learning rate {recipe["learning_rate"]} after {recipe["warmup_steps"]} steps of warm-up, falling to zero over the
  last {recipe["decay_ratio"]:.0%}, gradient norm clipped to {recipe["max_grad_norm"]}, bfloat16 autocast, dropout {model["resid_pdrop"]}.
  {results["seconds"] / 60:.0f} minutes on {results["machine"]["cores"]} cores ({results["machine"]["processor"]}).
- **Loss** on the held-out reviews: {results["validation_loss"]:.3f} nats per token, {results["bits_per_byte"]:.3f} bits per byte. The curve is in
  `results/pretraining_mini.json`.
- **Limits**: it knows English film reviews and nothing else, is small and, for its size, briefly trained. It exists so
  that every method can be run, compared and tested anywhere, offline. Its text is not meant to be read, its opinions
  are its sources'. For research and teaching, as IMDb's reviews are.
"""


def main() -> None:
    arguments = parse()
    folder = data_folder(arguments.data_dir)
    if folder is None:
        raise DataError("pretraining needs IMDb's parquet files: pass --data-dir, or set MINIPEFT_DATA, to a folder "
                        "that holds imdb/train-*.parquet and imdb/unsupervised-*.parquet")
    code = commit(Path(minipeft.__file__).parent, Path(__file__).parent)  # now: files may change while it trains
    config = PretrainingConfig(**given(arguments, PretrainingConfig))
    size = Size(**given(arguments, Size))
    device = choose_device(arguments.device)
    for place in (arguments.output, arguments.state, arguments.results.parent):
        check_writable(place)
    train_texts, held_out_texts = reviews(folder / "imdb")
    torch.manual_seed(config.seed)
    model = new_model(size, config.window, arguments.init_from).to(device)
    start = prepare_state(arguments.state, model, train_texts, arguments.init_from)
    print(f"tokenizing {len(train_texts):,} reviews")
    train_ids, held_out_ids = encode(arguments.state, train_texts), encode(arguments.state, held_out_texts)
    eos_token_id = model.config.eos_token_id
    batches = PackedWindows(train_ids, eos_token_id, config.window, config.batch_size, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {batches.tokens:,} tokens of text, {config.steps:,} steps of "
          f"{config.window * config.batch_size:,} tokens on {device}")
    precision = torch.bfloat16 if arguments.precision == "bf16" else torch.float32

    def held_out_loss(count: int | None = None) -> float:
        return validation_loss(model, held_out_ids[:count], eos_token_id, config.window, precision)

    history = pretrain(model, batches, lambda: held_out_loss(500), config, arguments.state, precision,
                       compile_model=not arguments.no_compile, start=start)
    data = {"train_reviews": len(train_texts), "held_out_reviews": len(held_out_texts),
            "train_tokens_per_epoch": batches.tokens, "held_out_bytes": sum(len(t.encode()) for t in held_out_texts)}
    write(arguments, model, config, {"initialisation": start["initialisation"], "commit": code}, history, data,
          held_out_loss(), sum(len(ids) + 1 for ids in held_out_ids))


def write(arguments: argparse.Namespace, model: GPT2LMHeadModel, config: PretrainingConfig, origin: dict[str, str],
          history: dict[str, Any], data: dict[str, int], loss: float, held_out_tokens: int) -> None:
    """Write the model folder with its card, and the results.

    Args:
        origin: {"initialisation", "commit"}: what the run began from, and the code that ran it, in the last sitting.
    """
    model.save_pretrained(arguments.output, dtype=torch.float16)
    shutil.copyfile(arguments.state / VOCABULARY_FILE, arguments.output / VOCABULARY_FILE)
    results = {
        "model": {"parameters": sum(p.numel() for p in model.parameters()), **model.config.to_dict()},
        "recipe": vars(config), "data": data, **origin,
        "tokens_seen": config.steps * config.window * config.batch_size,
        "validation_loss": round(loss, 4),
        "bits_per_byte": round(bits_per_byte(loss, held_out_tokens, data["held_out_bytes"]), 4),
        "seconds": history["seconds"], "curve": history["curve"], "machine": machine(), "versions": versions(),
        "pilots": read_json_file(Path(__file__).with_name("pilots.json"))}
    write_json_file(arguments.results, results)
    (arguments.output / "README.md").write_text(model_card(results), encoding="utf-8")
    print(f"validation loss {loss:.4f}; wrote {arguments.output} and {arguments.results}")


if __name__ == "__main__":
    run(main)
