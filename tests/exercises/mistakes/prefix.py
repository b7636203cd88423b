"""Mistakes in prefix tuning: (title, what stands in the right answer, what instead, what the grader has to say)."""

VIEW = "self.table.view(self.V, self.L, 2, self.H, D)[:, layer]"
KEYS = "block[:, 0].transpose(0, 1), block[:, 1].transpose(0, 1)"
STACKED = ("        key = torch.cat((prefix_key, key), dim=2)\n"
           "        value = torch.cat((prefix_value, value), dim=2)\n")
SIZE = "(num_virtual_tokens, 2 * n_layer * n_embd)"
START = "torch.randn" + SIZE
PADS = "            mask = mask & torch.cat((ones, attention_mask.bool()), dim=1)[:, None, None, :]\n"
SHOWN = "            shown = torch.cat((ones, attention_mask), dim=1)[:, None, None, :]\n"
REST = "            return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value\n"

MISTAKES = [
    ("triangle at the upper left, as is_causal's", "tril(self.V)", "tril()",
     "the triangle begins at the upper left corner"),
    ("mask added", "scores.masked_fill(~mask, -torch.inf)", "(scores + mask)", "the mask itself is added, 1 and 0"),
    ("zero instead of -infinity", "masked_fill(~mask, -torch.inf)", "masked_fill(~mask, 0.0)",
     "hidden scores are set to 0"),
    ("softmax over queries", "softmax(dim=-1)", "softmax(dim=-2)", "softmax over the queries"),
    ("softmax over heads", "softmax(dim=-1)", "softmax(dim=1)", "softmax over the heads"),
    ("no causal mask", ".tril(self.V)", "", "there is no causal mask within the text"),
    ("prefix behind the text", STACKED, STACKED.replace("(prefix_key, key)", "(key, prefix_key)")
     .replace("(prefix_value, value)", "(value, prefix_value)"), "the prefix stands behind the text"),
    ("values behind, keys before", "(prefix_value, value)", "(value, prefix_value)",
     "P_k stands before the keys, and P_v behind the values"),
    ("keys and values exchanged", KEYS, "block[:, 1].transpose(0, 1), block[:, 0].transpose(0, 1)",
     "key and value are exchanged"),
    ("exchanged in attention", "prefix_key, prefix_value =", "prefix_value, prefix_key =", "P_k and P_v are exchanged"),
    ("all keys first", VIEW, "self.table.view(self.V, 2, self.L, self.H, D)[:, :, layer]",
     "all blocks' keys come first in your table"),
    ("heads interleaved", VIEW, "self.table.view(self.V, self.L, 2, D, self.H)[:, layer].transpose(2, 3)",
     "the heads own every second channel"),
    ("heads across tokens", KEYS, "(block[:, n].reshape(self.H, self.V, D) for n in (0, 1))",
     "the heads are cut across virtual tokens"),
    ("one block for all", "[:, layer]", "[:, 0]", "every block gets block 0's"),
    ("attend with block 0", "self.keys_and_values(layer, B)", "self.keys_and_values(0, B)",
     "attend takes block 0's P_k and P_v"),
    ("no batch", "key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)", "key, value",
     "the batch is missing"),
    ("table of one block", "2 * n_layer * n_embd", "2 * n_embd", "each block has its own keys and values"),
    ("keys without values", "2 * n_layer * n_embd", "n_layer * n_embd", "keys or values are missing"),
    ("positions from 0", "torch.arange(self.V, self.V + T)", "torch.arange(T)", "the text begins at position 0"),
    ("virtual positions, too", "torch.arange(self.V, self.V + T)", "torch.arange(self.V + T)",
     "virtual tokens get positions, too"),
    ("positions with a batch", "torch.arange(self.V, self.V + T)", "torch.arange(self.V, self.V + T)[None]",
     "positions are the same for every text"),
    ("positions as floats", "torch.arange(self.V, self.V + T)", "torch.arange(self.V, self.V + T).float()",
     "positions are rows of wpe"),
    ("no scale", " / D**0.5", "", "not scaled: the scores are divided by sqrt(D)"),
    ("root of C", " / D**0.5", " / self.C**0.5", "divided by sqrt(C)"),
    ("prefix not put in", STACKED, "        prefix_key, prefix_value = key[:, :, :self.V], value[:, :, :self.V]\n"
     "        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)\n",
     "the prefix has no effect"),
    ("mask not used", "if attention_mask is not None", "if False", "attention_mask has no effect"),
    ("attention_mask added", PADS, SHOWN + "            scores = query @ key.transpose(2, 3) / D**0.5 + shown\n" + REST,
     "attention_mask is added, 1 and 0"),
    ("scores times attention_mask", PADS,
     SHOWN + "            scores = query @ key.transpose(2, 3) / D**0.5 * shown\n" + REST,
     "the scores are multiplied by attention_mask"),
    ("ones on the right of the mask", "(ones, attention_mask.bool())", "(attention_mask.bool(), ones)",
     "the mask's V ones stand on its right"),
    ("zeros for the prefix", "(ones, attention_mask.bool())", "(~ones, attention_mask.bool())",
     "the mask hides the prefix, too"),
    ("no ones for the prefix", "torch.cat((ones, attention_mask.bool()), dim=1)", "attention_mask.bool()",
     "the mask's V ones for the prefix are missing"),
    ("mask one axis short", "[:, None, None, :]", "[:, None, :]", "each text's mask is taken for a head's"),
    ("the first text's mask", "[:, None, None, :]", "[:1, None, None, :]", "every text gets the first one's mask"),
    ("starts at zero", START, "torch.zeros" + SIZE, "the table's numbers are all the same"),
    ("starts uniform", START, "torch.rand" + SIZE, "the table's mean is not 0"),
    ("starts small", START, "0.02 * " + START, "the table's numbers are too small"),
    ("starts large", START, "5 * " + START, "the table's numbers are too large"),
    ("starts uniform with deviation 1", START, "3**0.5 * (2 * torch.rand" + SIZE + " - 1)",
     "the table has the deviation of a standard normal, but not its range"),
    ("table no parameter", "nn.Parameter(torch.randn(num_virtual_tokens, 2 * n_layer * n_embd))",
     "torch.randn(num_virtual_tokens, 2 * n_layer * n_embd)", "table is a plain tensor"),
    ("table as data", "self.table.view(", "self.table.data.view(", "no gradient reaches the table"),
    ("values detached", "torch.cat((prefix_value, value)", "torch.cat((prefix_value.detach(), value)",
     "a part of the way from the table"),
]
