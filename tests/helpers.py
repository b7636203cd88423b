"""For tests of whole runs: a tiny model folder, tiny datasets, and the scripts called in this process."""

from __future__ import annotations

import base64
import json
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from minipeft import GPT2Config, GPT2LMHeadModel
from minipeft.data.datasets import load_dataset
from minipeft.data.tables import Reading
from minipeft.tasks import classification, task_for

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
# Each merge joins two earlier entries, so that " good" and " bad" are single tokens, as zero-shot needs.
MERGES = (" g", " go", " goo", " good", " b", " ba", " bad")
VOCAB_SIZE = 256 + len(MERGES) + 1
TEXTS = {"positive": "a good film number {}, truly good", "negative": "a bad film number {}, truly bad"}


# --- models -----------------------------------------------------------------------------------------------------------

def write_vocabulary(folder):
    """A rank file of the 256 bytes and MERGES; end-of-text takes the next id."""
    entries = [bytes([value]) for value in range(256)] + [merge.encode() for merge in MERGES]
    lines = [base64.b64encode(entry) + b" %d\n" % rank for rank, entry in enumerate(entries)]
    (Path(folder) / "vocab.tiktoken").write_bytes(b"".join(lines))


def write_tiny_model(folder, seed=0, **sizes):
    """A GPT-2 of two blocks and 64 positions in the official layout, with its vocabulary; returns the folder."""
    torch.manual_seed(seed)
    config = GPT2Config(**{"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2,
                           "initializer_range": 0.1, "bos_token_id": VOCAB_SIZE - 1, "eos_token_id": VOCAB_SIZE - 1,
                           **sizes})
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_vocabulary(folder)
    return Path(folder)


# --- data -------------------------------------------------------------------------------------------------------------

def rows(per_label=20, labels=("negative", "positive")):
    """(text, label) pairs that one word tells apart, alternating; no two texts alike."""
    return [(TEXTS["positive" if label in ("positive", 1) else "negative"].format(i), label)
            for i in range(per_label) for label in labels]


def write_csv(path, content=None, header=("text", "label")):
    """A comma-separated file with every field quoted; returns its path as a string, as a user would give it."""
    lines = [header, *(rows() if content is None else content)]
    quoted = [",".join('"' + str(field).replace('"', '""') + '"' for field in line) for line in lines]
    Path(path).write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return str(path)


def write_parquet(path, **columns):
    """A parquet file of the given columns; returns its path as a string."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def write_imdb(folder, train=100, test=20, unsupervised=0, text="a {} film,<br /><br />number {} of {}"):
    """IMDb's parquet files as the hub lays them out, sorted by class as they are there; returns `folder`."""
    for split, count in (("train", train), ("test", test), ("unsupervised", unsupervised)):
        if count:
            labels = [-1] * count if split == "unsupervised" else [i * 2 // count for i in range(count)]
            texts = [text.format("good" if label else "bad", i, split) for i, label in enumerate(labels)]
            write_parquet(Path(folder) / "imdb" / f"{split}-00000-of-00001.parquet", text=texts, label=labels)
    return Path(folder)


def write_datasets(folder, train=12, others=4):
    """Tiny parquet files of sst2, wnut_17, scitldr and multi30k, laid out as on the hub; returns `folder`."""
    for split, count in (("train", train), ("validation", others), ("test", others)):
        columns = {
            "sst2": {"sentence": [f"a {'good' if i % 2 else 'bad'} film {split} {i}" for i in range(count)],
                     "label": [i % 2 for i in range(count)]},
            "wnut_17": {"tokens": [["Ada", "saw", f"Rome{i}"] for i in range(count)],
                        "ner_tags": [[9, 0, 7] for _ in range(count)]},
            "scitldr": {"source": [["We study bad films.", f"Number {i}."] for i in range(count)],
                        "target": [[f"bad film {i}", "bad"][:1 if split == "train" else 2] for i in range(count)],
                        "paper_id": [str(i) for i in range(count)]},
            "multi30k": {"en": [f"a dog {i}" for i in range(count)], "de": [f"ein Hund {i}" for i in range(count)]}}
        for name, table in columns.items():
            write_parquet(Path(folder) / name / f"{split}-00000-of-00001.parquet", **table)
    return Path(folder)


def load(name, *arguments, task=None, **named):
    """`load_dataset` for the dataset's own task or, of a file, for the task that is asked for.

    Args:
        named: arguments of `load_dataset`, and fields of its `reading`.
    """
    reading = Reading(**{field.name: named.pop(field.name) for field in fields(Reading) if field.name in named})
    return load_dataset(name, task_for(name, task), *arguments, reading=reading, **named)


def changed_by_hand(folder):
    """Say of an adapter's or a model's folder that its files are changed by hand: the account forgets their digests."""
    account = Path(folder) / "minipeft.json"
    if account.is_file():
        content = read_json(account)
        content.pop("files", None)
        account.write_text(json.dumps(content))


def files_below(*folders):
    """Every file below the given folders, to see what a run has left there."""
    return sorted(str(file) for folder in folders for file in Path(folder).rglob("*") if file.is_file())


# --- predictions ------------------------------------------------------------------------------------------------------

def logits_of(model, task, texts=("a good film", "a bad film", "neither")):
    """A classifier's logits of a few texts, (N, K)."""
    ids = classification.encode(list(texts), task.tokenizer, task.max_length, task.truncation)
    return classification.predict_logits(model, ids, torch.device("cpu"), torch.float32)


# --- scripts ----------------------------------------------------------------------------------------------------------

@dataclass
class Outcome:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self):
        """What stderr holds besides progress bars, which end in a carriage return or hold one."""
        lines = [line.rsplit("\r", 1)[-1] for line in self.err.split("\n")]
        return [line for line in lines if line.strip() and "%|" not in line and "it/s" not in line]


class ScriptRunner:
    """runner("train.py", "--epochs", 1) runs a script as the command line would, but in this process."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.syspath_prepend(SCRIPTS)

    def __call__(self, script, *arguments):
        self.monkeypatch.syspath_prepend((SCRIPTS / script).parent)
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPTS / script), *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        captured = self.capsys.readouterr()
        code = ended.value.code
        return Outcome(0 if code is None else code, captured.out, captured.err)


def read_json(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
