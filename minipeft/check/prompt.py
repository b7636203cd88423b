"""What an answer to exercises/prompt.py is held against."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.check.judging import (
    Refused,
    call,
    check_gradients,
    check_trained,
    expect,
    expect_same,
    expect_shape,
    given,
    parameter,
    put,
    trained_count,
    whole,
)
from minipeft.check.references import reference_case

NAMES = {"Prompt": 3, "Prompt.embed": 3, "Prompt.extend_mask": 1, "Prompt.strip": 1, "Prompt.pool": 2}
V, C = 2, 2
WORDS = whole([1, 2], [3, 5], [-2, 4], [7, -6])                               # wte
PLACES = whole([10, 0], [0, 20], [30, 30], [0, -40], [50, -50], [60, 7])      # wpe
P, IDS = whole([100, 300], [-200, 500]), torch.tensor([[1, 3]])
# Of two texts of 4 tokens behind the prompt, the first padded on the left, the second on the right.
HIDDEN, MASK = (torch.arange(24.0)**2).view(2, V + 4, C), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])


def embedding(rows: Tensor) -> nn.Embedding:
    """A frozen embedding with these rows."""
    return nn.Embedding.from_pretrained(rows.clone(), freeze=True)


def make(answer: ModuleType, virtual: int = V, ids: Sequence[int] = (1, 3)) -> tuple[Any, Tensor]:
    """The answer's prompt with its table."""
    prompt = answer.Prompt(virtual, embedding(WORDS), list(ids))
    return prompt, parameter(prompt, "prompt", virtual, C, wrong={
        (len(ids), C): "the rows are not repeated or cut to V"})


def shapes(answer: ModuleType) -> None:
    prompt, _ = make(answer)
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    expect_shape("embed(input_ids, wte, wpe)", prompt.embed(ids, embedding(WORDS), embedding(PLACES)), (2, V + 3, C),
                 torch.float32, "input_ids (2, 3), V 2")
    for dtype in (MASK.dtype, torch.bool, torch.float32):
        got = call("extend_mask(attention_mask)", prompt.extend_mask, MASK.to(dtype))
        expect_shape("extend_mask(attention_mask)", got, (2, V + 4), dtype, f"{given(attention_mask=MASK)}, {dtype}", {
            (2, 4): "the mask does not know of the prompt: V ones are missing",
            torch.float32: "the mask becomes a float: it keeps its dtype"}, "the mask's dtype changes: it keeps it")
    got = call("strip(hidden)", prompt.strip, HIDDEN)
    expect_shape("strip(hidden)", got, (2, 4, C), torch.float32, "hidden (2, 6, 2), V 2",
                 wrong={(2, V + 4, C): "nothing is cut off: the head would see the prompt's positions"})
    got = call("pool(hidden, attention_mask)", prompt.pool, HIDDEN, MASK)
    expect_shape("pool(hidden, attention_mask)", got, (2, C), torch.float32,
                 "hidden (2, 6, 2), V 2")


def formula(answer: ModuleType) -> None:
    _start(answer)
    prompt, table = make(answer)
    put(table, P)
    wte, wpe = embedding(WORDS), embedding(PLACES)
    words = WORDS[IDS[0]]
    stacked = torch.cat((P, words))
    got = call("embed(input_ids, wte, wpe)", prompt.embed, IDS, wte, wpe)
    expect("embed(input_ids, wte, wpe)", got[0], stacked + PLACES[:4],
           given(P=P, input_ids=IDS, wte=WORDS, wpe=PLACES), {
               "the prompt stands behind the text: it comes before": torch.cat((words, P)) + PLACES[:4],
               "the prompt gets no positions: wpe is added to it, too": torch.cat((P, words + PLACES[2:4])),
               "the text begins at position 0: the prompt takes V positions, and has wpe of 0 to V - 1":
                   torch.cat((P + PLACES[:2], words + PLACES[:2])),
               "the text begins at position 0, and the prompt gets no positions": torch.cat((P, words + PLACES[:2])),
               "wpe is left out": stacked,
               "positions begin at 1: they begin at 0": stacked + PLACES[1:5],
               "wpe is added to the prompt only": torch.cat((P + PLACES[:2], words)),
               "the text has wpe added twice": torch.cat((P + PLACES[:2], words + 2 * PLACES[2:4])),
               "P is added to the text's embeddings: it stands before them": words + P + PLACES[:2]})
    _outputs(prompt)


def _start(answer: ModuleType) -> None:
    """P as it starts, from a text that is shorter than V, and from one that is longer."""
    ids, virtual = [2, 3], 5
    expect("self.prompt at the start", make(answer, virtual, ids)[1].detach(), WORDS[[2, 3, 2, 3, 2]],
           given(V=virtual, ids=ids, wte=WORDS), {
               "P is the first rows of wte: it is those of the ids": WORDS[[0, 1, 2, 3, 0]],
               "each word is repeated by itself: the whole text is, 7 8 7 8 7": WORDS[[2, 2, 2, 3, 3]],
               "P is filled up with its last word: the whole text is repeated": WORDS[[2, 3, 3, 3, 3]],
               "P is filled up with zeros: the whole text is repeated": torch.cat((WORDS[ids], torch.zeros(3, C))),
               "P is the mean of the words in every row": WORDS[ids].mean(0).expand(virtual, C),
               "P starts at zero": torch.zeros(virtual, C)})
    ids, virtual = [3, 0, 1], 2
    expect("self.prompt at the start", make(answer, virtual, ids)[1].detach(), WORDS[[3, 0]],
           given(V=virtual, ids=ids, wte=WORDS),
           {"the text's end is taken: it is cut behind the first V": WORDS[[0, 1]]})


def _outputs(prompt: Any) -> None:
    """What comes in beside x, and what is made of what comes out."""
    ones = torch.ones(2, V, dtype=MASK.dtype)
    expect("extend_mask(attention_mask)", prompt.extend_mask(MASK.clone()),
           torch.cat((ones, MASK), 1),
           given(attention_mask=MASK, V=V), {
               "the prompt is hidden: it gets ones, not zeros": torch.cat((ones * 0, MASK), 1),
               "the ones stand on the right: the prompt is on the left": torch.cat((MASK, ones), 1),
               "pads are shown: the text's own part stays as it is": torch.ones(2, V + 4, dtype=MASK.dtype),
               "the mask's first columns are repeated: the prompt gets ones": torch.cat((MASK[:, :V], MASK), 1)})
    expect("strip(hidden)", prompt.strip(HIDDEN.clone()), HIDDEN[:, V:],
           "hidden 0, 1, 4, 9, ... in shape (2, 6, 2), V 2", {
        "the text's end is cut off: the prompt stands at the beginning": HIDDEN[:, :-V],
        "one position too few is cut off": HIDDEN[:, V - 1:],
        "the prompt is kept, and the text cut off": HIDDEN[:, :V]})
    rows = torch.arange(2)
    expect("pool(hidden, attention_mask)", prompt.pool(HIDDEN.clone(), MASK.clone()),
           HIDDEN[rows, torch.tensor([5, 3])],
           given(attention_mask=MASK, V=V) + ", hidden 0, 1, 4, 9, ... in shape (2, 6, 2)", _wrong_pools())


def _wrong_pools() -> dict[str, Tensor]:
    """Misconception -> the vectors it takes from HIDDEN."""
    rows, number = torch.arange(2), MASK.sum(1)
    last = torch.tensor([3, 1])                                               # of the text alone
    return {"the last position is taken: with pads on the right that is a pad": HIDDEN[:, -1],
            "the place in the text is taken, not that behind the prompt: V is missing": HIDDEN[rows, last],
            "the number of real tokens is taken for the place of the last: not so with pads on the left":
                HIDDEN[rows, V + number - 1],
            "the number of real tokens is taken for the place of the last, and V is missing": HIDDEN[rows, number - 1],
            "one position too late: the last real token's place is one less than their number":
                HIDDEN[rows, V + number],
            "the first real token is taken": HIDDEN[rows, torch.tensor([3, 2])],
            "the mean of the real tokens is taken": torch.stack((HIDDEN[0, 3:6].mean(0), HIDDEN[1, 2:4].mean(0))),
            "the mean of all positions is taken": HIDDEN.mean(1),
            "the mean of the text's positions is taken, pads and all": HIDDEN[:, V:].mean(1),
            "the prompt's last position is taken": HIDDEN[:, V - 1]}


def gradients(answer: ModuleType) -> None:
    prompt, _ = make(answer)
    prompt, wte, wpe = prompt.double(), embedding(WORDS).double(), embedding(PLACES).double()
    check_gradients("embed(input_ids, wte, wpe)", lambda: prompt.embed(torch.tensor([[0, 1], [2, 3]]), wte, wpe),
                    {"P": parameter(prompt, "prompt", V, C)})


def trained(answer: ModuleType) -> None:
    words = embedding(WORDS)
    prompt = answer.Prompt(V, words, [1, 2])
    table = parameter(prompt, "prompt", V, C)
    if any(tensor is words.weight for tensor in prompt.parameters()):
        raise Refused("the parameters of Prompt", "wte among them", "P alone", because=
                      "wte is a part of the module: its rows are saved and counted with P; keep P alone")
    check_trained(prompt, {"P": table}, {"wte": words.weight})
    put(table, P)
    if not torch.equal(words.weight, WORDS):
        raise Refused("wte after P has changed", "other rows", "those of before", because=
                      "P is a view of wte: training it moves the words; copy the rows")


def count(answer: ModuleType) -> None:
    expect_same("trained parameters: V C", trained_count(make(answer)[0].parameters()), V * C, given(V=V, C=C))


def padding(answer: ModuleType) -> None:
    prompt, _ = make(answer)
    hidden = torch.randn(1, V + 3, C)
    alone = prompt.pool(hidden, torch.ones(1, 3, dtype=torch.long))
    expect("pool(hidden, attention_mask), no pads", alone, hidden[:, -1], "attention_mask [[1, 1, 1]]")
    pads = torch.randn(1, 2, C)
    for side, mask in (("left", [[0, 0, 1, 1, 1]]), ("right", [[1, 1, 1, 0, 0]])):
        parts = (hidden[:, :V], *((pads, hidden[:, V:]) if side == "left" else (hidden[:, V:], pads)))
        expect(f"pool(hidden, attention_mask) with pads on the {side}, and without",
               prompt.pool(torch.cat(parts, 1), torch.tensor(mask)), alone, given(attention_mask=mask))


def reference(answer: ModuleType) -> None:
    case = reference_case("prompt")
    wte, wpe = embedding(case["wte"]), embedding(case["wpe"])
    prompt = answer.Prompt(3, wte, [0])
    put(parameter(prompt, "prompt", 3, 4), case["P"])
    expect("embed(input_ids, wte, wpe)", prompt.embed(case["input_ids"].long(), wte, wpe), case["x"],
           "peft's case prompt in minipeft/check/references.json")
