"""Every method against peft: adapters written by one library and read by the other, over the configuration space."""

import itertools
import json
import re

import pytest
import torch
from helpers import changed_by_hand, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_helpers import (
    INNER_SIZES,
    METHODS,
    TASKS,
    Batch,
    assert_close,
    assert_same_function,
    batch,
    generate_theirs,
    inject_ours,
    inject_theirs,
    load_theirs,
    move,
    real_logits,
    save_theirs,
    write_pair,
)

from minipeft import (
    MinipeftError,
    PromptTuningConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
)
from minipeft.errors import AdapterError, ConfigError
from minipeft.methods.folder import CONFIG_FILE
from minipeft.tasks.decoding import generate

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes

tasks = pytest.mark.parametrize("task", TASKS)
methods = pytest.mark.parametrize("method", METHODS)
POOLING_LAST = [name for name, method in METHODS.items() if method.pools_last_position]
VIRTUAL = [name for name, method in METHODS.items() if method.is_virtual]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(task, n_inner) -> the same base model in both libraries."""
    return {(task, n_inner): write_pair(tmp_path_factory.mktemp("base"), task, n_inner=n_inner)
            for task, n_inner in itertools.product(TASKS, INNER_SIZES)}


@pytest.fixture
def pair(pairs, task):
    """The same base model in both libraries, with the task's head."""
    return pairs[task, None]


# --- the space of configurations --------------------------------------------------------------------------------------

ENDINGS = ["c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj", "transformer.h.1.mlp.c_fc"]
EXPRESSIONS = [r".*\.c_attn", r".*\.h\.[01]\.attn\.c_(attn|proj)", r"transformer\.h\.2\..*\.c_fc|.*c_attn",
               "all-linear"]
PATTERNS = ["c_attn", "h.0.attn.c_proj", "h.[12].attn.c_proj", "mlp.c_proj", "^transformer.h.1.mlp.c_fc"]  # disjoint
EXCLUDED = [["c_proj"], r".*\.h\.0\..*", ["transformer.h.0.mlp.c_fc"]]  # leaves c_attn somewhere
endings = st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=3, unique=True)


@st.composite
def targets(draw):
    """Names, one expression, all-linear or nothing said; a list perhaps only in some of the blocks."""
    chosen = draw(st.none() | endings | endings | st.sampled_from(EXPRESSIONS))
    if not isinstance(chosen, list) or not draw(st.booleans()):
        return {"target_modules": chosen}
    return {"target_modules": sorted({*chosen, "c_attn"}),  # an ending, so that there is something in each block
            "layers_to_transform": draw(st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1, unique=True)),
            "layers_pattern": draw(st.sampled_from([None, "h"]))}


@st.composite
def lora(draw):
    fields = {"r": draw(st.integers(1, 8)), "lora_alpha": draw(st.sampled_from([1, 2.5, 8, 16])),
              "bias": draw(st.sampled_from(["none", "lora_only", "all"])), **draw(targets())}
    if draw(st.booleans()):
        fields["rank_pattern"] = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3))
        fields["alpha_pattern"] = draw(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([1, 4, 20.5]),
                                                       max_size=3))
    if fields["target_modules"] == "all-linear" and draw(st.booleans()):
        fields["exclude_modules"] = draw(st.sampled_from(EXCLUDED))
    return fields


@st.composite
def plain_lora(draw):
    return {**draw(lora()), "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"]))}


@st.composite
def dora(draw):
    return {**draw(lora()), "use_rslora": draw(st.booleans())}


@st.composite
def vera(draw):
    return {"r": draw(st.integers(1, 9)), "bias": draw(st.sampled_from(["none", "vera_only", "all"])),
            "d_initial": draw(st.sampled_from([0.1, 1.0])), "projection_prng_key": draw(st.integers(0, 2**31)),
            "save_projection": draw(st.booleans()), **draw(targets())}


@st.composite
def ia3(draw):
    if draw(st.booleans()):
        chosen = draw(endings)
        # A list of feed-forward modules that is not part of the list of targets cannot be read back by peft.
        inner = draw(st.lists(st.sampled_from(chosen), unique=True) | st.just(r".*\.c_proj"))
    else:
        chosen = draw(st.sampled_from(EXPRESSIONS))
        inner = draw(st.sampled_from([[], r".*\.(c_attn|c_proj)"]))
        if chosen != "all-linear":  # which is stored as a list
            inner = draw(st.sampled_from([inner, ["mlp.c_proj"], ["proj"]]))  # "proj": no dot needed here
    fields = {"target_modules": chosen, "feedforward_modules": inner, "init_ia3_weights": draw(st.booleans())}
    if chosen == "all-linear" and draw(st.booleans()):
        fields["exclude_modules"] = draw(st.sampled_from(EXCLUDED))
    return draw(st.just({}) | st.just(fields) | st.just(fields))


virtual_tokens = st.integers(1, 40 - 9 - 1)  # of 40 positions the longest text takes 9
hidden_sizes = st.none() | st.integers(1, 30)
FIELDS = {
    "LoRA": plain_lora(), "rsLoRA": plain_lora(), "DoRA": dora(), "PiSSA": lora(), "(IA)^3": ia3(), "VeRA": vera(),
    "prompt tuning": st.fixed_dictionaries({
        "num_virtual_tokens": virtual_tokens, "prompt_tuning_init": st.sampled_from(["RANDOM", "SAMPLE_VOCAB"])}),
    "P-tuning, MLP": st.fixed_dictionaries({
        "num_virtual_tokens": virtual_tokens, "encoder_hidden_size": hidden_sizes}),
    "P-tuning, LSTM": st.fixed_dictionaries({
        "num_virtual_tokens": virtual_tokens, "encoder_hidden_size": hidden_sizes,
        "encoder_num_layers": st.integers(1, 3)}),
    "prefix tuning": st.fixed_dictionaries({
        "num_virtual_tokens": virtual_tokens, "init_weights": st.sampled_from([None, "zero"])}),
    "prefix tuning, projected": st.fixed_dictionaries({
        "num_virtual_tokens": virtual_tokens, "encoder_hidden_size": hidden_sizes}),
}


@st.composite
def cases(draw, method):
    """A configuration's fields and the base model's n_inner."""
    return draw(FIELDS[method]), draw(st.sampled_from(INNER_SIZES))


# --- both directions --------------------------------------------------------------------------------------------------

def assert_loads(pair, folder, reference, method, task):
    """Loaded here, peft's adapter is the same function and trains as many parameters; merged, it gives the same logits.

    Of virtual tokens only the table is stored: fewer parameters than those that made it, and nothing to merge.
    """
    model = load_adapter(pair.ours(), folder)
    assert_same_function(model, reference, pair.our_model, method, task)
    if not METHODS[method].is_virtual:
        assert trainable_parameters(model).trainable == reference.get_nb_trainable_parameters()[0]
        assert_close(real_logits(merge(model), task, batch("right")), real_logits(reference, task, batch("right")))


def few(method):
    """How many configurations: more where there are more fields."""
    return settings(max_examples=8 if METHODS[method].config == "LoraConfig" else 6)


@tasks
@methods
def test_an_adapter_written_by_peft_is_the_same_function_here(pairs, tmp_path_factory, method, task):
    @few(method)
    @given(case=cases(method))
    def holds(case):
        chosen, n_inner = case
        pair = pairs[task, n_inner]
        reference = inject_theirs(pair, method, task, chosen)
        assert_loads(pair, save_theirs(reference, tmp_path_factory.mktemp("adapter")), reference, method, task)

    holds()


@tasks
@methods
def test_an_adapter_written_here_is_the_same_function_in_peft(pairs, tmp_path_factory, method, task):
    @few(method)
    @given(case=cases(method))
    def holds(case):
        chosen, n_inner = case
        pair, folder = pairs[task, n_inner], tmp_path_factory.mktemp("adapter")
        model = inject_ours(pair, method, chosen)
        save_adapter(model, folder)
        assert_same_function(model, load_theirs(pair, folder), pair.our_model, method, task)

    holds()


# --- generation -------------------------------------------------------------------------------------------------------

@methods
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_token_identical_with_every_method(pairs, tmp_path, method, num_beams):
    pair = pairs["CAUSAL_LM", None]
    model = inject_ours(pair, method)
    save_adapter(model, tmp_path)
    reference = load_theirs(pair, tmp_path)
    prompts = [Batch(batch("left").ids[:1], None)]
    if not METHODS[method].pools_last_position:  # with a prompt peft ignores where padded texts begin, and says so
        prompts.append(batch("left"))
    for ids, mask in prompts:
        for eos in (None, int(generate(model, ids, mask, 6)[0, -1])):
            found = generate(model, ids, mask, 15, num_beams=num_beams, length_penalty=0.5, eos_token_id=eos)
            penalty = {"length_penalty": 0.5} if num_beams > 1 else {}
            assert torch.equal(found, generate_theirs(reference, ids, mask, 15, eos, num_beams=num_beams, **penalty))
            assert eos is not None or len(found[:, ids.shape[1]:].unique()) > 2   # not a constant: the test can fail


# --- what a random configuration seldom is ----------------------------------------------------------------------------

SPECIAL = {
    "every bias": ("LoRA", {"r": 2, "bias": "all"}),
    "one block, by number and by name": ("LoRA", {
        "r": 3, "target_modules": ["c_proj", "transformer.h.0.attn.c_attn"], "layers_to_transform": 1}),
    "one block, with what stands before its number": ("LoRA", {
        "r": 3, "target_modules": ["c_proj", "transformer.h.0.attn.c_attn"], "layers_to_transform": 1,
        "layers_pattern": "h"}),
    "LoRA everywhere": ("LoRA", {"r": 4, "target_modules": "all-linear"}),
    "PiSSA everywhere": ("PiSSA", {"r": 4, "target_modules": "all-linear"}),
    "rsLoRA everywhere, patterns": ("rsLoRA", {
        "r": 4, "target_modules": "all-linear", "rank_pattern": {"c_fc": 9, "c_attn": 1},
        "alpha_pattern": {"h.1.attn.c_proj": 20.5, "c_attn": 1}, "bias": "lora_only"}),
    "patterns of which two match": ("LoRA", {
        "r": 8, "target_modules": ["c_proj"], "rank_pattern": {"c_proj": 2, "attn.c_proj": 4},
        "alpha_pattern": {"c_proj": 3, "attn.c_proj": 40}}),
    "DoRA that starts as PiSSA": ("DoRA", {"init_lora_weights": "pissa", "target_modules": "all-linear"}),
    "DoRA with a rank of each module's own": ("DoRA", {
        "r": 4, "use_rslora": True, "target_modules": ["c_attn", "mlp.c_proj"], "rank_pattern": {"mlp.c_proj": 7}}),
    "PiSSA with rsLoRA's scale": ("PiSSA", {"r": 5, "use_rslora": True, "alpha_pattern": {"h.1.attn.c_attn": 3}}),
    "VeRA with targets of all shapes": ("VeRA", {"r": 6, "target_modules": "all-linear", "bias": "all"}),
    "VeRA with projections from the seed": ("VeRA", {"r": 6, "save_projection": False, "projection_prng_key": 7}),
    "a start that the file says nothing about": ("LoRA", {"r": 4, "init_lora_weights": "orthogonal"}),
    "a field that peft ignores here": ("LoRA", {"use_qalora": True}),
}
READ_ONLY = ["a start that the file says nothing about", "a field that peft ignores here"]
WRITE_ONLY = ["patterns of which two match"]  # peft sorts them on saving: in its own file another one counts


@tasks
@pytest.mark.parametrize("special", [special for special in SPECIAL if special not in WRITE_ONLY])
def test_a_special_adapter_written_by_peft_is_the_same_function_here(pair, tmp_path, special, task):
    method, chosen = SPECIAL[special]
    reference = inject_theirs(pair, method, task, chosen)
    assert_loads(pair, save_theirs(reference, tmp_path), reference, method, task)


@tasks
@pytest.mark.parametrize("special", [special for special in SPECIAL if special not in READ_ONLY])
def test_a_special_adapter_written_here_is_the_same_function_in_peft(pair, tmp_path, special, task):
    method, chosen = SPECIAL[special]
    model = inject_ours(pair, method, chosen)
    save_adapter(model, tmp_path)
    assert_same_function(model, load_theirs(pair, tmp_path), pair.our_model, method, task)


@pytest.mark.parametrize("method", ["LoRA", "VeRA"])
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_peft_may_write_layers_pattern_as_a_list(pair, tmp_path, method, task):
    reference = inject_theirs(pair, method, task, {
        "r": 4, "target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"]})
    assert_loads(pair, save_theirs(reference, tmp_path), reference, method, task)


@pytest.mark.parametrize("target_modules", [["c_attn"], ["c_attn", "c_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_ia3_without_feedforward_modules_written_here_loads_in_peft(pair, tmp_path, target_modules, task):
    """peft then stores its default, which is no part of the targets, and cannot read its own file again."""
    if target_modules == ["c_attn"]:
        save_theirs(inject_theirs(pair, "(IA)^3", task, {"target_modules": ["c_attn"]}), tmp_path / "theirs")
        with pytest.raises(ValueError, match="subset"):
            load_theirs(pair, tmp_path / "theirs")
    model = inject_ours(pair, "(IA)^3", {"target_modules": target_modules})
    save_adapter(model, tmp_path / "ours")
    assert_same_function(model, load_theirs(pair, tmp_path / "ours"), pair.our_model, "(IA)^3", task)


@pytest.mark.parametrize("tokenizer", [None, "the base's folder"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_prompt_that_started_as_a_text_loads_in_peft(tmp_path, tokenizer, task):
    """With and without the name of the tokenizer, which ours takes from the model if there is none."""
    pair = write_pair(tmp_path / "base", task, vocab_size=300)
    write_vocabulary(tmp_path / "base")
    fields = {"num_virtual_tokens": 6, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good or bad?",
              "tokenizer_name_or_path": tokenizer and str(tmp_path / "base")}
    model = move(inject(pair.ours(), PromptTuningConfig(**fields))).eval()
    save_adapter(model, tmp_path / "adapter")
    assert_same_function(model, load_theirs(pair, tmp_path / "adapter"), pair.our_model, "prompt tuning", task)


@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_a_prompt_that_peft_started_as_a_text_loads_without_its_tokenizer(pair, tmp_path, task):
    reference = inject_theirs(pair, "prompt tuning", task)
    save_theirs(reference, tmp_path)
    edit_config(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="good or bad?",
                tokenizer_name_or_path="nowhere/at-all", tokenizer_kwargs={"use_fast": True})
    assert_same_function(load_adapter(pair.ours(), tmp_path), reference, pair.our_model, "prompt tuning", task)


@methods
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_the_smallest_configuration_means_peft_s_defaults(pair, tmp_path, method, task):
    """Only peft_type and task_type, and what has no default or is not at it."""
    chosen = {} if not METHODS[method].is_virtual else None
    reference = inject_theirs(pair, method, task, chosen)
    save_theirs(reference, tmp_path)
    saved = json.loads((tmp_path / CONFIG_FILE).read_text())
    needed = {"peft_type", "task_type", "num_virtual_tokens", *METHODS[method].fixed}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({key: saved[key] for key in needed & saved.keys()}))
    assert_loads(pair, tmp_path, reference, method, task)


# --- pooling ----------------------------------------------------------------------------------------------------------

def each_text_alone(model, texts):
    """(B, K) logits, one text at a time and without padding."""
    return torch.cat([real_logits(model, "SEQ_CLS", Batch(ids[real.bool()][None], None))
                      for ids, real in zip(texts.ids, texts.mask)])


@methods
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_a_right_padded_text_is_classified_here_as_if_it_stood_alone(pair, method, task):
    """peft pools a pad of the two short texts where a prompt is put before them; for a text alone it agrees."""
    ours, texts = inject_ours(pair, method), batch("right")
    alone = each_text_alone(ours, texts)
    assert_close(real_logits(ours, task, texts), alone)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize("method", POOLING_LAST)
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_peft_s_prompts_pool_a_pad_of_right_padded_texts_and_ours_do_not(pair, tmp_path, method, task):
    ours, texts = inject_ours(pair, method), batch("right")
    save_adapter(ours, tmp_path)
    theirs = load_theirs(pair, tmp_path)
    alone = each_text_alone(ours, texts)
    assert_close(each_text_alone(theirs, texts), alone)
    assert_close(real_logits(ours, task, texts), alone)
    padded = real_logits(theirs, task, texts)
    assert_close(padded[0], alone[0])  # the longest text has no pads
    for short in (1, 2):
        assert (padded[short] - alone[short]).abs().max() > 1e-2


# --- refused ----------------------------------------------------------------------------------------------------------

def edit_config(folder, **fields):
    """Change fields of an adapter_config.json."""
    changed_by_hand(folder)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused(pair, folder, message, error=MinipeftError):
    """Loading raises one line with this in it, and leaves the model as it was."""
    model, ids = pair.ours(), batch("right").ids
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message) as raised:
        load_adapter(model, folder)
    assert "\n" not in str(raised.value)
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(model(ids), pair.our_model(ids))


@pytest.fixture(scope="module")
def stored(pairs, tmp_path_factory):
    """stored(method): a folder of its own with peft's adapter for sequence classification."""
    written = {}

    def copy_of(method):
        if method not in written:
            reference = inject_theirs(pairs["SEQ_CLS", None], method, "SEQ_CLS")
            written[method] = save_theirs(reference, tmp_path_factory.mktemp("stored"))
        folder = tmp_path_factory.mktemp("copy")
        for file in written[method].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy_of


@pytest.mark.parametrize(("field", "value"), [
    ("target_parameters", ["transformer.wte.weight"]), ("trainable_token_indices", [1, 2]),
    ("layer_replication", [[0, 2], [1, 3]]), ("alora_invocation_tokens", [5, 6]), ("arrow_config", {"top_k": 2}),
    ("use_bdlora", {"nblocks": 2}), ("velora_config", {"rank": 1}), ("kasa_config", {"beta": 1e-4}),
    ("monteclora_config", {"x": 1}), ("megatron_config", {"x": 1}), ("ensure_weight_tying", True),
    ("lora_bias", True)])
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_a_lora_field_that_changes_the_numbers_is_refused_by_name(pair, stored, field, value, task):
    folder = stored("LoRA")
    assert field in json.loads((folder / CONFIG_FILE).read_text())  # peft knows it under this name
    edit_config(folder, **{field: value})
    assert_refused(pair, folder, rf"sets {field}=", ConfigError)


@pytest.mark.parametrize("value", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of tomorrow"])
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_an_initialisation_that_changes_the_base_is_refused_by_name(pair, stored, value, task):
    folder = stored("LoRA")
    edit_config(folder, init_lora_weights=value)
    assert_refused(pair, folder, f"init_lora_weights.*{value}", ConfigError)


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize(("field", "value"), [("num_transformer_submodules", 2), ("token_dim", 48), ("num_layers", 2),
                                              ("num_attention_heads", 2)])
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_virtual_tokens_for_other_dimensions_are_refused_by_name(pair, stored, method, field, value, task):
    folder = stored(method)
    edit_config(folder, **{field: value})
    assert_refused(pair, folder, f"another {field}; this model's is", ConfigError)


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_virtual_tokens_without_a_task_are_refused(pair, stored, method, task):
    """peft would load them and then ignore them."""
    folder = stored(method)
    edit_config(folder, task_type=None)
    assert_refused(pair, folder, "does not say its task_type", AdapterError)


@pytest.mark.parametrize("kind", sorted({kind.value for kind in peft.PeftType} - {
    "LORA", "IA3", "VERA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}))
@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_every_other_method_of_peft_is_refused_by_name(pair, stored, kind, task):
    folder = stored("LoRA")
    edit_config(folder, peft_type=kind)
    assert_refused(pair, folder, rf"peft_type '{kind}'; known are", AdapterError)


@pytest.mark.parametrize(("fields", "named"), [
    ({"target_modules": ["c_attn", "wte"]}, "wte"), ({"target_modules": ["c_attn", "lm_head"]}, "lm_head"),
    ({"target_modules": ["c_attn"], "modules_to_save": ["wte"]}, "wte"),
    ({"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, "lm_head")], ids=str)
@pytest.mark.parametrize("task", ["CAUSAL_LM"])
def test_an_adapter_on_the_embeddings_is_refused_by_their_name(pair, tmp_path, fields, named, task):
    save_theirs(inject_theirs(pair, "LoRA", task, fields), tmp_path)
    assert_refused(pair, tmp_path, re.escape(named))
