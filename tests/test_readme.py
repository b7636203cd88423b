"""README says what is true: its example trains, its tables are the code's and the results', and it is short."""

import re

import pytest
import torch
from documents import README, ROOT, code_blocks, tables
from helpers import read_json, write_csv, write_tiny_model

from minipeft import GPT2Config, GPT2ForSequenceClassification, LoraConfig, inject, merge, trainable_parameters
from minipeft.data.batches import BucketedBatches
from minipeft.errors import InjectionError
from minipeft.methods import METHODS
from minipeft.methods.injection import active_injections, fingerprint
from minipeft.methods.layers import ReplacementLayer
from minipeft.model.hub import MINI_FOLDER
from minipeft.report.tables import IN_SHORT
from minipeft.runs.defaults import DEFAULTS
from minipeft.runs.inference import load, predict
from minipeft.runs.places import default_folder
from minipeft.runs.plan import Options

TEXT = README.read_text(encoding="utf-8")
METHOD_ROWS, RESULT_ROWS = tables(TEXT)
BUNDLED_ADAPTER = ROOT / default_folder("lora", "imdb")


def test_it_is_short_and_the_picture_comes_first():
    assert len(TEXT.encode()) <= 9000
    assert TEXT.index("results/anatomy/lora.png") < TEXT.index("make train") < TEXT.index("```python")


def test_the_python_example_trains_as_printed(tmp_path, monkeypatch, capsys):
    """Every line as it is printed; only an epoch ends after two batches."""
    example, _ = code_blocks(TEXT, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    whole_epoch = BucketedBatches.epoch
    monkeypatch.setattr(BucketedBatches, "epoch", lambda self, number: [
        batch for batch, _ in zip(whole_epoch(self, number), range(2))])
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(example, "README.md", "exec"), found)
    output = capsys.readouterr().out
    assert "trainable params: " in output and "% of the test split" in output
    assert found["logits"].shape == (16, 2) and type(found["logits"]) is torch.Tensor
    assert {path.name for path in (tmp_path / "checkpoints/first").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "minipeft.json"}


def test_the_example_of_one_call_trains_and_predicts_as_printed(tmp_path, monkeypatch, capsys):
    """Every line as it is printed; only the base is a tiny one."""
    _, example = code_blocks(TEXT, "python")
    monkeypatch.chdir(tmp_path)
    write_csv("reviews.csv")
    exec(compile(example.replace("Options(dataset", f"Options(model={str(write_tiny_model('tiny'))!r}, dataset"),
                 "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert "wrote checkpoints/reviews" in " ".join(lines[:-2])
    assert [line.split("\t")[2] for line in lines[-2:]] == ["A moving film.", "Dull, and too long."]


def test_what_make_train_comes_to_is_the_mean_of_the_runs_that_are_there():
    runs = [read_json(path) for path in sorted((ROOT / "results" / "sample").glob("seed?/*_results.json"))]
    assert sorted(run["training_config"]["seed"] for run in runs) == [0, 1, 2]
    assert {(run["method"], run["dataset"]["name"], run["training_config"]["epochs"]) for run in runs} == {
        ("lora", "sample", DEFAULTS["lora"]["training"]["epochs"])}
    mean = sum(run["metrics"]["test"]["accuracy"] for run in runs) / 3
    assert f"LoRA gets {100 * mean:.0f} % right ([three seeds](results/sample))" in TEXT


# --- the table of methods ---------------------------------------------------------------------------------------------

def config_of(row):
    """The configuration that a row's second column links to."""
    call, file = re.fullmatch(r"\[`(.+)`\]\((.+)\)", row[1]).groups()
    assert (ROOT / file).stem == row[0].strip("`")
    name, arguments = re.fullmatch(r"(\w+)(\(.*\))?", call).groups()
    classes = {method.config_class.__name__: method.config_class for method in METHODS.values()}
    return eval(f"{name}{arguments or '()'}", classes)


def test_each_method_has_a_row():
    assert [row[0] for row in METHOD_ROWS] == [f"`{method}`" for method in METHODS]
    assert [config_of(row).method for row in METHOD_ROWS] == list(METHODS)


each_row = pytest.mark.parametrize("row", METHOD_ROWS, ids=[row[0].strip("`") for row in METHOD_ROWS])


def on_gpt2(config):
    """GPT-2 124M's shape with a two-label head and the method."""
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(GPT2Config.official("gpt2"))
    return inject(model, config)


@each_row
def test_the_parameters_of_a_method_are_those_of_gpt2(row):
    assert row[4] == f"{trainable_parameters(on_gpt2(config_of(row))).trainable:,}"


@each_row
def test_the_shapes_in_a_row_are_those_of_the_layers(row):
    """Every matrix of a layer has its shape in the row, and every shape in the row is some tensor's."""
    config = config_of(row)
    model = on_gpt2(config)
    layers = active_injections(model)[0].layers.values()
    if not layers:
        return  # trains the model's own tensors
    sizes = {"C": model.config.n_embd, "L": model.config.n_layer, "r": getattr(config, "r", None),
             "V": getattr(config, "num_virtual_tokens", None)}
    stated, found = set(re.findall(r"\(([^()]+)\)", row[3])), set()
    for layer in layers:
        if isinstance(layer, ReplacementLayer):
            sizes |= {"out": layer.base_layer.out_features, "width": layer.base_layer.in_features}
        # in is a word of Python's, and · is no sign of its own
        shapes = {text: eval(f"({text.replace('in', 'width').replace('·', '*')},)", sizes) for text in stated}
        actual = {tuple(layer.get_parameter(name).shape) for name in layer.trained}
        assert {shape for shape in actual if len(shape) == 2} <= set(shapes.values())
        found |= {text for text, shape in shapes.items() if shape in actual}
    assert found == stated
    assert (sizes["C"], sizes["L"]) == (768, 12) and sizes["V"] in (None, 20), "as the text above the table says"


@each_row
def test_a_method_starts_as_the_base_or_not_and_merges_or_not_as_the_table_says(row, make_model, make_ids):
    model, ids = make_model(GPT2ForSequenceClassification), make_ids(2, 7)
    base = model(ids)
    inject(model, config_of(row))
    assert row[5] == ("yes" if torch.equal(model(ids), base) else "no")
    try:
        merge(model)
    except InjectionError as error:
        assert row[6] == ("-" if "there is nothing to merge" in str(error) else "no")
    else:
        assert row[6] == "yes"


def test_every_method_trains_the_head_and_its_parameters_are_counted():
    model = on_gpt2(METHODS["head"].config_class())
    assert f"{sum(p.numel() for p in model.score.parameters()):,} are trained by every method" in " ".join(TEXT.split())


def test_loras_two_sets_of_defaults_are_as_it_says():
    ours = DEFAULTS["lora"]["method"]
    assert (LoraConfig().lora_alpha, LoraConfig().target_modules) == (8, None)   # None is c_attn: see test_lora.py
    assert ours == {"lora_alpha": 16, "target_modules": "all-linear"}
    words = " ".join(TEXT.split())
    assert "peft's defaults (`lora_alpha` 8, `c_attn` alone)" in words and "`mini` (16, all linear layers)" in words


# --- results ----------------------------------------------------------------------------------------------------------

def test_the_results_have_the_budget_that_is_said_and_a_row_for_each_method_in_short():
    found, words = read_json(ROOT / "results/comparison.json")["datasets"]["sst2"], " ".join(TEXT.split())
    assert f"On the {found['sizes']['test']:,} test sentences of SST-2" in words
    assert f"{found['sizes']['train']:,} sentences to learn from, three epochs and three seeds for each method" in words
    assert found["terms"]["budget"]["epochs"] == 3 and {row[2] for row in RESULT_ROWS[1:]} == {"3"}
    assert [row[0].split(" (")[0] for row in RESULT_ROWS[1:]] == sorted(set(IN_SHORT) & found["methods"].keys(),
                                                         key=lambda method: found["methods"][method]["mean"])


def test_the_bundled_adapter_is_small_gets_what_it_says_and_is_of_the_bundled_model():
    account = read_json(BUNDLED_ADAPTER / "minipeft.json")
    if "bundled" not in account:
        pytest.skip("a training here took its place")
    found = read_json(ROOT / account["results"])
    test, how = found["metrics"]["test"], f"([how]({account['results']}))"
    said = f"LoRA on IMDb gets {100 * test['accuracy']:.1f} % of the {test['examples']:,} test reviews right {how}"
    assert said in " ".join(TEXT.split())
    assert account["request"]["training_config"] == found["training_config"]
    assert account["base_fingerprint"] == found["base_model"]["fingerprint"] == fingerprint(
        GPT2ForSequenceClassification.from_pretrained("mini"))
    assert sum(path.stat().st_size for path in BUNDLED_ADAPTER.iterdir()) < 1_000_000


def test_the_bundled_adapter_knows_praise_from_blame():
    texts = re.search(r'predict\.py "(.+)" "(.+)"', TEXT).groups()
    trained = load(BUNDLED_ADAPTER, Options(device="cpu"))
    assert [line.split("\t")[0] for line in predict(trained, texts)] == ["positive", "negative"]


def test_the_bundled_model_is_small_and_complete():
    names = {path.name for path in MINI_FOLDER.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.tiktoken", "README.md"}
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) <= 24_000_000
