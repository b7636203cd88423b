"""The whole idea on one screen: a frozen GPT-2, LoRA inside it, a training loop, and the adapter on disk and back.

    python scripts/minimal.py [STEPS]          # 60 without a number: less than a minute on a CPU
"""

import sys
from itertools import count

import torch

from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject, trainable_parameters
from minipeft.data.batches import BucketedBatches, collate
from minipeft.data.datasets import load_dataset
from minipeft.methods.saving import load_adapter, save_adapter
from minipeft.tasks.classification import Classification

word = sys.argv[1] if len(sys.argv) > 1 else "60"
if not word.isdecimal():
    print(__doc__, file=sys.stdout if word == "--help" else sys.stderr)
    sys.exit(word != "--help")
torch.manual_seed(0)
data, tokenizer = load_dataset("sample", Classification), get_tokenizer("mini")
batches = BucketedBatches(tokenizer.encode_batch(data.train.texts), data.train.labels, batch_size=16)
test = collate(tokenizer.encode_batch(data.test.texts), data.test.labels)

model = GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2)
inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))     # in place; everything else is frozen
print(trainable_parameters(model))
trained = [p for p in model.parameters() if p.requires_grad]                   # every A and B, and the new head
frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
optimizer = torch.optim.AdamW(trained, lr=1.5e-3)
model.train()
for step, batch in zip(range(1, int(word) + 1), (batch for epoch in count() for batch in batches.epoch(epoch))):
    logits = model(batch.input_ids, attention_mask=batch.attention_mask)       # (16, 2), a plain tensor
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}   loss {loss.item():.4f}")
model.eval()
save_adapter(model, "checkpoints/minimal")
fresh = load_adapter(GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2), "checkpoints/minimal")
with torch.no_grad():
    logits = model(test.input_ids, attention_mask=test.attention_mask)         # (720, 2)
    loaded = fresh(test.input_ids, attention_mask=test.attention_mask)
print(f"test accuracy {(logits.argmax(dim=1) == test.labels).float().mean():.3f}")
print("frozen tensors unchanged:", all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items()))
print("same logits after loading:", torch.equal(loaded, logits))
