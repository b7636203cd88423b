"""The sides that predict (classification and generation, ours and transformers'), and the machine's own limit."""

from __future__ import annotations

import numpy as np
import torch
from job import PAD, Job, Turn, padded, read_batches
from torch import Tensor


def classify_ours(job: Job, turn: Turn) -> None:
    """Classify the job's texts; ours sorts them by length unless the batches are to be the reference's."""
    from minipeft import GPT2ForSequenceClassification
    from minipeft.data.batches import collate
    from minipeft.tasks.classification import predict_logits
    from minipeft.tasks.evaluation import predicting
    from minipeft.training.hardware import cast_frozen, choose_precision

    ids, _, plan = read_batches(job)
    precision = choose_precision(job["precision"], turn.device)
    model = GPT2ForSequenceClassification.from_pretrained(job["base"]).to(turn.device).requires_grad_(False)
    cast_frozen(model, precision)
    while True:
        turn.wait()
        if job["matched"]:
            parts = []
            with predicting(model, turn.device, precision):
                for rows in plan:
                    batch = collate([ids[i] for i in rows], [0] * len(rows)).to(turn.device)
                    parts.append(model(**batch.arguments()))                  # (B, K)
            logits = torch.cat(parts)                                         # (N, K)
        else:
            logits = predict_logits(model, [ids[i] for rows in plan for i in rows], turn.device, precision)
        turn.report(texts=sum(map(len, plan)), checksum=float(logits.float().abs().sum()))


def classify_transformers(job: Job, turn: Turn) -> None:
    """transformers on the same texts, in batches as they come, padded to the longest."""
    import transformers
    from transformers import AutoModelForSequenceClassification
    transformers.logging.set_verbosity_error()

    ids, _, plan = read_batches(job)
    model = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=2, pad_token_id=PAD)
    model = model.eval().to(turn.device)
    while True:
        turn.wait()
        parts = []
        with torch.inference_mode():
            for rows in plan:
                texts = [ids[i] for i in rows]
                batch = padded(texts, max(map(len, texts)))
                batch = {name: tensor.to(turn.device) for name, tensor in batch.items()}
                parts.append(model(**batch).logits)                           # (B, K)
        turn.report(texts=sum(map(len, plan)), checksum=float(torch.cat(parts).float().abs().sum()))


def _prompts(job: Job, device: torch.device) -> Tensor:
    """The beginnings of a batch of texts, (B, T)."""
    ids, _, _ = read_batches(job)
    long_enough = [row for row in ids if len(row) >= job["prompt_tokens"]][:job["batch_size"]]
    return torch.from_numpy(np.stack([row[:job["prompt_tokens"]] for row in long_enough])).to(device)


def generate_ours(job: Job, turn: Turn) -> None:
    """Greedy generation with the key-value cache, as predict.py does it."""
    from minipeft import GPT2LMHeadModel
    from minipeft.tasks.decoding import generate
    from minipeft.training.hardware import cast_frozen, choose_precision, computing_in

    precision = choose_precision(job["precision"], turn.device)
    model = GPT2LMHeadModel.from_pretrained(job["base"]).to(turn.device).requires_grad_(False)
    cast_frozen(model, precision)
    prompts = _prompts(job, turn.device)
    while True:
        turn.wait()
        with computing_in(precision, turn.device):
            ids = generate(model, prompts, max_new_tokens=job["new_tokens"])
        turn.report(tokens=len(prompts) * job["new_tokens"], checksum=int(ids.sum()))


def generate_transformers(job: Job, turn: Turn) -> None:
    """transformers' generate, greedy, with its cache."""
    import transformers
    from transformers import AutoModelForCausalLM
    transformers.logging.set_verbosity_error()

    model = AutoModelForCausalLM.from_pretrained(job["base"]).eval().to(turn.device)
    prompts = _prompts(job, turn.device)
    while True:
        turn.wait()
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=PAD,
                             max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"])
        turn.report(tokens=len(prompts) * job["new_tokens"], checksum=int(ids.sum()))


# --- the limit --------------------------------------------------------------------------------------------------------

def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN: torch itself asks MKL for float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def matrix_products(job: Job, turn: Turn) -> None:
    """The frozen products of one training step and nothing else: x W^T forwards, and dy W backwards, in each block."""
    from minipeft.model.linear import onednn_multiplies

    C, tokens = job["n_embd"], job["tokens"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    product = _onednn if job["by"] == "onednn" and onednn_multiplies(dtype) else torch.nn.functional.linear
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    weights = [[torch.randn(out, into, device=turn.device, dtype=dtype) for into, out in shapes]
               for _ in range(job["n_layer"])]
    inputs = {width: torch.randn(tokens, width, device=turn.device, dtype=dtype) for width in (C, 3 * C, 4 * C)}
    while True:
        turn.wait()
        with torch.inference_mode():
            for block in weights * job["micro_batches"]:
                for weight in block:
                    product(inputs[weight.shape[1]], weight)                  # (tokens, in) -> (tokens, out)
                    product(inputs[weight.shape[0]], weight.T)                # (tokens, out) -> (tokens, in)
        turn.report(operations=sum(2 * 2 * tokens * into * out for into, out in shapes)
                    * job["n_layer"] * job["micro_batches"])
