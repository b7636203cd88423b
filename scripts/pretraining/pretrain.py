"""Pretrain the bundled base model `mini` on IMDb's train and unsupervised reviews. Run again, it goes on.

    python scripts/pretraining/pretrain.py --data-dir ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe import PackedWindows, PretrainingConfig, bits_per_byte, pretrain, validation_loss

from minipeft.data.datasets import data_folder, read_parquet_split, stratified_split
from minipeft.data.examples import clean
from minipeft.errors import ConfigError, DataError
from minipeft.files import check_writable, write_json_file
from minipeft.model import hub
from minipeft.model.gpt2 import GPT2Config, GPT2LMHeadModel
from minipeft.model.tokenizer import VOCABULARY_FILE, get_tokenizer, train_vocabulary
from minipeft.runs.command_line import run
from minipeft.training.hardware import choose_device, machine, versions


def parse() -> argparse.Namespace:
    recipe = PretrainingConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", help="folder that holds imdb/*.parquet (default: MINIPEFT_DATA)")
    where.add_argument("--output", type=Path, default=hub.MINI_FOLDER, help="model folder to write")
    where.add_argument("--state", type=Path, default=Path("checkpoints/pretraining_state"),
                       help="folder of the resumable state")
    where.add_argument("--results", type=Path, default=Path("results/pretraining_mini.json"))
    where.add_argument("--init-from", type=Path, help="start from this model folder, not at random")
    size = parser.add_argument_group("size (ignored with --init-from)")
    size.add_argument("--n-layer", type=int, default=6)
    size.add_argument("--n-head", type=int, default=4)
    size.add_argument("--n-embd", type=int, default=256)
    size.add_argument("--vocab-size", type=int, default=8192, help="entries, end-of-text included")
    how = parser.add_argument_group("recipe")
    how.add_argument("--tokens", type=int, default=recipe.tokens, help="tokens to train on, all epochs together")
    how.add_argument("--window", type=int, default=recipe.window, help="tokens per window, and the model's positions")
    how.add_argument("--batch-size", type=int, default=recipe.batch_size, help="windows per step")
    how.add_argument("--micro-batch", type=int, default=recipe.micro_batch, help="windows computed at once")
    how.add_argument("--adamw", action="store_true", help="AdamW for everything, instead of Muon for matrices")
    how.add_argument("--weight-decay", type=float, default=recipe.weight_decay, help="on matrices")
    how.add_argument("--decay-ratio", type=float, default=recipe.decay_ratio,
                     help="share of the steps, the last ones, over which the rate falls to zero")
    how.add_argument("--learning-rate", type=float, default=recipe.learning_rate, help="peak")
    how.add_argument("--warmup-steps", type=int, default=recipe.warmup_steps)
    how.add_argument("--dropout", type=float, default=0.0, help="for runs of several epochs")
    how.add_argument("--evaluate-every", type=int, default=recipe.evaluate_every, help="steps between evaluations")
    how.add_argument("--save-every", type=int, default=recipe.save_every, help="steps between saves of the state")
    how.add_argument("--seed", type=int, default=recipe.seed)
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


def model_card(results: dict[str, Any]) -> str:
    """What the bundled model is, from what was measured while making it."""
    model, recipe, data = results["model"], results["recipe"], results["data"]
    start = ("random initialisation" if results["initialisation"] == "random" else
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
- **Recipe**: `scripts/pretraining/pretrain.py`, from {start}. {results["tokens_seen"]:,} tokens in
  batches of {recipe["batch_size"]} x {recipe["window"]}, {optimizer}, weight decay {recipe["weight_decay"]} on matrices, learning rate {recipe["learning_rate"]} after
  {recipe["warmup_steps"]} steps of warm-up, falling to zero over the last {recipe["decay_ratio"]:.0%}, gradient norm clipped to {recipe["max_grad_norm"]}, bfloat16 autocast, dropout
  {model["resid_pdrop"]}. {results["seconds"] / 60:.0f} minutes on {results["machine"]["cores"]} cores ({results["machine"]["processor"]}).
- **Loss** on the held-out reviews: {results["validation_loss"]:.3f} nats a token, {results["bits_per_byte"]:.3f} bits a byte. The curve is in
  `results/pretraining_mini.json`.
- **Limits**: it knows English film reviews and nothing else, is small and, for its size, briefly trained. It exists so
  that every method can be run, compared and tested anywhere, offline. Its text is not meant to be read, its opinions
  are its sources'. For research and teaching, as IMDb's reviews are.
"""


def main() -> None:
    options = parse()
    folder = data_folder(options.data_dir)
    if folder is None:
        raise DataError("pretraining needs IMDb's parquet files: pass --data-dir, or set MINIPEFT_DATA, to a folder "
                        "that holds imdb/train-*.parquet and imdb/unsupervised-*.parquet")
    config = PretrainingConfig(tokens=options.tokens, window=options.window, batch_size=options.batch_size,
                               micro_batch=options.micro_batch, muon=not options.adamw,
                               weight_decay=options.weight_decay, decay_ratio=options.decay_ratio,
                               learning_rate=options.learning_rate, warmup_steps=options.warmup_steps,
                               seed=options.seed, evaluate_every=options.evaluate_every, save_every=options.save_every)
    device = choose_device(options.device)
    if not 257 <= options.vocab_size <= 2**16:
        raise ConfigError(f"vocab_size must lie between 257 and 65,536, got {options.vocab_size}")
    for place in (options.output, options.state, options.results.parent):
        check_writable(place)
    train_texts, held_out_texts = reviews(folder / "imdb")
    torch.manual_seed(options.seed)
    dropouts = {name: options.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if options.init_from:
        vocabulary = options.init_from / VOCABULARY_FILE
        model = GPT2LMHeadModel.from_pretrained(options.init_from, **dropouts)
    else:
        vocabulary = options.state / VOCABULARY_FILE
        if not vocabulary.is_file():
            print(f"training a vocabulary of {options.vocab_size:,} entries")
            train_vocabulary(train_texts, options.vocab_size - 1, vocabulary)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=options.vocab_size, n_positions=options.window, n_embd=options.n_embd, n_layer=options.n_layer,
            n_head=options.n_head, bos_token_id=options.vocab_size - 1, eos_token_id=options.vocab_size - 1,
            **dropouts))
    tokenizer = get_tokenizer(vocabulary.parent)
    model.to(device)
    print(f"tokenising {len(train_texts):,} reviews")
    train_ids = [np.array(ids, dtype=np.uint16) for ids in tokenizer.encode_batch(train_texts)]
    held_out_ids = [np.array(ids, dtype=np.uint16) for ids in tokenizer.encode_batch(held_out_texts)]

    precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
    batches = PackedWindows(train_ids, tokenizer.eos_token_id, config.window, config.batch_size, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {batches.tokens:,} tokens of text, {config.steps:,} steps of "
          f"{config.window * config.batch_size:,} tokens on {device}")

    def held_out_loss(count: int | None = None) -> float:
        return validation_loss(model, held_out_ids[:count], tokenizer.eos_token_id, config.window, precision)

    history = pretrain(model, batches, lambda: held_out_loss(500), config, options.state, precision,
                       compile_model=not options.no_compile)
    loss = held_out_loss()
    model.save_pretrained(options.output, dtype=torch.float16)
    if vocabulary.parent.resolve() != options.output.resolve():
        (options.output / VOCABULARY_FILE).write_bytes(vocabulary.read_bytes())
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    results = {
        "model": {"parameters": parameters, **model.config.to_dict()}, "recipe": vars(config),
        "initialisation": str(options.init_from.name) if options.init_from else "random",
        "data": {"train_reviews": len(train_texts), "held_out_reviews": len(held_out_texts),
                 "train_tokens_per_epoch": batches.tokens, "held_out_bytes": held_out_bytes},
        "tokens_seen": config.steps * config.window * config.batch_size,
        "validation_loss": round(loss, 4),
        "bits_per_byte": round(bits_per_byte(loss, sum(len(ids) + 1 for ids in held_out_ids), held_out_bytes), 4),
        "seconds": history["seconds"], "curve": history["curve"], "machine": machine(), "versions": versions()}
    write_json_file(options.results, results)
    (options.output / "README.md").write_text(model_card(results), encoding="utf-8")
    print(f"validation loss {loss:.4f}; wrote {options.output} and {options.results}")


if __name__ == "__main__":
    run(main)
