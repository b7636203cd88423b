"""Mistakes in adapters: (title, what stands in the right answer, what instead, what the grader has to say)."""

SUM = "h + self.scaling * self.up(inner)"
FIRST = "x = x + self.first(self.block.attn(self.block.ln_1(x)))"
SECOND = "x + self.second(self.block.mlp(self.block.ln_2(x)))"
INIT = "        nn.init.zeros_(self.up.weight)\n        nn.init.zeros_(self.up.bias)\n"

MISTAKES = [
    ("no residual", SUM, "self.scaling * self.up(inner)", "h itself is not added"),
    ("up random", INIT, "", "up.weight starts random"),
    ("up's bias random", "        nn.init.zeros_(self.up.bias)\n", "", "up.bias starts random"),
    ("both zero", INIT, INIT + "        nn.init.zeros_(self.down.weight)\n", "both matrices start at zero"),
    ("no relu", "torch.relu(self.down(h))", "self.down(h)", "relu is left out"),
    ("relu behind up", {"torch.relu(self.down(h))": "self.down(h)", "self.up(inner)": "torch.relu(self.up(inner))"},
     None,
     "relu stands behind W_up"),
    ("relu on the sum", SUM, "torch.relu(h + self.scaling * self.up(inner))", "relu is applied to the sum"),
    ("relu before down", "torch.relu(self.down(h))", "self.down(torch.relu(h))", "relu is applied to h"),
    ("gelu", "torch.relu(", "nn.functional.gelu(", "gelu instead of relu"),
    ("no scale", SUM, "h + self.up(inner)", "the scale is left out"),
    ("scale on all", SUM, "self.scaling * (h + self.up(inner))", "the scale falls on h, too"),
    ("scale before up", SUM, "h + self.up(self.scaling * inner)", "the scale stands before b_up"),
    ("no bias", {"nn.Linear(width, bottleneck)": "nn.Linear(width, bottleneck, bias=False)"}, None,
     "self.down has no bias"),
    ("behind the addition", {FIRST: "x = self.first(x + self.block.attn(self.block.ln_1(x)))",
                             SECOND: "self.second(x + self.block.mlp(self.block.ln_2(x)))"}, None,
     "the adapters stand behind the block's addition"),
    ("before the sub-layers", {FIRST: "x = x + self.block.attn(self.first(self.block.ln_1(x)))",
                               SECOND: "x + self.block.mlp(self.second(self.block.ln_2(x)))"}, None,
     "the adapters stand before the sub-layers"),
    ("one place only", FIRST, "x = x + self.block.attn(self.block.ln_1(x))", "there is no adapter behind attention"),
    ("one adapter twice", SECOND, "x + self.first(self.block.mlp(self.block.ln_2(x)))",
     "one adapter stands in both places"),
    ("one object for both", "self.second = BottleneckAdapter(width, bottleneck, scaling)", "self.second = self.first",
     "there is one adapter"),
    ("LayerNorms left out", {FIRST: "x = x + self.first(self.block.attn(x))", SECOND:
     "x + self.second(self.block.mlp(x))"},
     None, "ln_1 and ln_2 are left out"),
    ("scale not handed on", {"self.first = BottleneckAdapter(width, bottleneck, scaling)":
                             "self.first = BottleneckAdapter(width, bottleneck)",
                             "self.second = BottleneckAdapter(width, bottleneck, scaling)":
                             "self.second = BottleneckAdapter(width, bottleneck)"}, None,
     "scaling is not handed on"),
    ("block not frozen", "block.requires_grad_(False)", "block", "block.ln_1.weight and 11 more are trained"),
    ("all frozen", "        self.second = BottleneckAdapter(width, bottleneck, scaling)\n",
     "        self.second = BottleneckAdapter(width, bottleneck, scaling)\n        self.requires_grad_(False)\n",
     "first.down.weight is frozen: it has to learn"),
    ("LayerNorms trained", "self.block = block.requires_grad_(False)",
     "self.block = block\n        block.attn.requires_grad_(False), block.mlp.requires_grad_(False)",
     "block.ln_1.weight and 3 more are trained"),
    ("down zero, up random", INIT, "        nn.init.zeros_(self.down.weight)\n",
     "W_down and W_up have changed places"),
    ("down constant", INIT, INIT + "        nn.init.ones_(self.down.weight)\n",
     "down.weight is not random, its rows are the same"),
    ("a frozen copy", "self.block = block.requires_grad_(False)",
     "import copy\n        self.block = copy.deepcopy(block).requires_grad_(False)",
     "self.block is not the given object itself"),
    ("x changed in place", FIRST, "x += self.first(self.block.attn(self.block.ln_1(x)))",
     "AdaptedBlock(...)(x) changes its input in place"),
    ("the block without gradients", FIRST, "with torch.no_grad():\n"
     "            a = self.block.attn(self.block.ln_1(x))\n"
     "        x = x + self.first(a)", "a part of the way from x to AdaptedBlock(...)(x) is cut off"),
    ("x detached", SECOND, "x.detach() + self.second(self.block.mlp(self.block.ln_2(x.detach())))",
     "no gradient reaches x"),
    ("inner detached", "self.up(inner)", "self.up(inner.detach())", "no gradient reaches down.weight"),
]
