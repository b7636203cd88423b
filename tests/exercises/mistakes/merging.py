"""Mistakes in merging: (title, what stands in the right answer, what instead, what the grader has to say)."""

LORA = "adapted(W, A, B, lora_alpha / r).to(W.dtype)"
COPIES = '{"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}'
PUT = "    with torch.no_grad():\n        layer.weight.copy_(weight)\n        layer.bias.copy_(bias)\n"
BACK = '''    with torch.no_grad():
        layer.weight.copy_(kept["weight"])
        layer.bias.copy_(kept["bias"])
'''

MISTAKES = [
    ("alpha alone", LORA, "adapted(W, A, B, lora_alpha).to(W.dtype)",
     "LoRA: scaled by lora_alpha, not by lora_alpha / r"),
    ("no scale", LORA, "adapted(W, A, B, 1).to(W.dtype)", "LoRA: not scaled"),
    ("W left out", LORA, "(adapted(W, A, B, lora_alpha / r) - W).to(W.dtype)", "the update alone is returned"),
    ("alpha times r", LORA, "adapted(W, A, B, lora_alpha * r).to(W.dtype)",
     "LoRA: scaled by lora_alpha * r"),
    ("A B", "s * B @ A", "s * A @ B", "LoRA: A B instead of B A"),
    ("number by number", "s * B @ A", "s * B * A", "B and A are multiplied number by number"),
    ("transposed as for Conv1D", "s * B @ A", "s * (B @ A).T", "LoRA: the update is transposed"),
    ("W changed in place", LORA, "W.add_((lora_alpha / r * B @ A).to(W.dtype))",
     "merged_lora(W, ...) changes its input in place"),
    ("dtype forgotten", LORA, "adapted(W, A, B, lora_alpha / r)", "the new matrix has not the dtype of W"),
    ("rounded too early", LORA, "W + (lora_alpha / r * B @ A).to(W.dtype)",
     "the update is rounded to W's dtype before"),
    ("length of W alone", "V / V.norm(dim=1)[:, None]", "V / W.norm(dim=1)[:, None]",
     "DoRA: the length is that of W alone"),
    ("columns' length", "V / V.norm(dim=1)[:, None]", "V / V.norm(dim=0)",
     "DoRA: the length is taken over the columns"),
    ("columns stretched", "m[:, None] * V / V.norm(dim=1)[:, None]", "m * V / V.norm(dim=1)[:, None]",
     "DoRA: the columns are stretched"),
    ("both along the columns", "m[:, None] * V / V.norm(dim=1)[:, None]", "m * V / V.norm(dim=1)",
     "DoRA: m and the lengths meet the columns"),
    ("lengths along the columns", "V / V.norm(dim=1)[:, None]", "V / V.norm(dim=1)",
     "DoRA: the lengths meet the columns"),
    ("no division", "m[:, None] * V / V.norm(dim=1)[:, None]", "m[:, None] * V",
     "DoRA: not divided by the row's length"),
    ("DoRA rounded too early", "    V = adapted(W, A, B, lora_alpha / r)\n",
     "    V = adapted(W, A, B, lora_alpha / r).to(W.dtype)\n", "DoRA: W + s B A, or its direction, is rounded"),
    ("m rounded", "(m[:, None] * V", "(m.to(W.dtype)[:, None] * V", "DoRA: m is rounded to W's dtype first"),
    ("l rounded", "W * l[:, None]", "W * l.to(W.dtype)[:, None]", "(IA)^3: l is rounded to the weight's dtype first"),
    ("l rounded for the bias", "bias * l", "bias * l.to(bias.dtype)", "(IA)^3: l is rounded to the bias's dtype first"),
    ("kinds exchanged", "    if feedforward:\n", "    if not feedforward:\n",
     "(IA)^3: the two kinds of layer are exchanged"),
    ("columns of an ordinary layer", "W * l[:, None]", "W * l", "(IA)^3: the columns are scaled"),
    ("bias of an ordinary layer", "(bias * l).to(bias.dtype)", "bias", "(IA)^3: the bias is not scaled"),
    ("bias of a feed-forward layer", "(W * l).to(W.dtype), bias", "(W * l).to(W.dtype), (bias * l).to(bias.dtype)",
     "(IA)^3: the bias is scaled"),
    ("kept as references", COPIES, '{"weight": layer.weight, "bias": layer.bias}',
     "after unmerge the merged weight is still there"),
    ("undone by subtraction", {
        COPIES: '{"weight": weight - layer.weight, "bias": bias - layer.bias}',
        'layer.weight.copy_(kept["weight"])': 'layer.weight.sub_(kept["weight"])',
        'layer.bias.copy_(kept["bias"])': 'layer.bias.sub_(kept["bias"])'}, None,
     "unmerge gives the old values up to rounding only"),
    ("kept tensors put in", BACK, '    layer.weight.data, layer.bias.data = kept["weight"], kept["bias"]\n',
     "unmerge makes the kept tensor the layer's own"),
    ("new Parameters", PUT, "    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)\n",
     "merge puts a new Parameter in place of the old"),
    ("with the graph", "    with torch.no_grad():\n        layer.weight.copy_(weight)", "    if True:\n"
     "        layer.weight.copy_(weight)", "the merged weight hangs on the adapter"),
    ("unfrozen", PUT, PUT + "    layer.requires_grad_(True)\n", "merge unfreezes the layer"),
    ("bias forgotten in merge", PUT, PUT.replace("        layer.bias.copy_(bias)\n", ""),
     "merge puts the weight in, and forgets the bias"),
    ("bias forgotten in unmerge", BACK, BACK.replace('        layer.bias.copy_(kept["bias"])\n', ""),
     "after unmerge the merged bias is still there"),
    ("given tensors taken over", PUT, "    layer.weight.data, layer.bias.data = weight.detach(), bias.detach()\n",
     "the layer took over the given tensor itself"),
    ("DoRA in place", "    V = adapted(W, A, B, lora_alpha / r)\n",
     "    V = W.float()\n    V += lora_alpha / r * B @ A\n", "merged_dora(W, ...) changes its input in place"),
    ("(IA)^3 in place", "(W * l[:, None]).to(W.dtype), (bias * l).to(bias.dtype)",
     "W.mul_(l[:, None]), bias.mul_(l)", "merged_ia3(...) changes its input in place"),
    ("bias in W's dtype", "(bias * l).to(bias.dtype)", "(bias * l).to(W.dtype)", "the new bias has W's dtype"),
    ("bias with the graph", PUT, "    layer.weight.data.copy_(weight)\n    layer.bias.copy_(bias)\n",
     "the merged bias hangs on the adapter"),
    ("one dictionary for all layers", {"def merge(": "KEPT = {}\n\n\ndef merge(", "    return kept\n":
     "    KEPT.update(kept)\n    return KEPT\n"}, None, "one layer gets the other's old values"),
    ("bias unfrozen in unmerge", BACK, BACK + "    layer.bias.requires_grad_(True)\n", "unmerge unfreezes the bias"),
    ("new bias in unmerge", BACK, '    layer.weight.data.copy_(kept["weight"])\n'
     '    layer.bias = nn.Parameter(kept["bias"], requires_grad=False)\n', "unmerge has to put the bias's values back"),
    ("nothing returned", "    return kept\n", "", "merge returns nothing"),
]
