"""Mistakes in prompt tuning: (title, what stands in the right answer, what instead, what the grader has to say)."""

ROWS = "nn.Parameter(wte.weight.detach()[ids].clone())"
POOL = """        places = torch.arange(attention_mask.shape[1])
        last = (places * attention_mask).argmax(dim=1)
        return self.strip(hidden)[torch.arange(len(hidden)), last]
"""
WPE = "        return x + wpe(torch.arange(x.shape[1]))\n"

MISTAKES = [
    ("prompt behind the text", "torch.cat((prompt, words), dim=1)", "torch.cat((words, prompt), dim=1)",
     "the prompt stands behind the text"),
    ("no positions for the prompt", {"words = wte(input_ids)":
     "words = wte(input_ids) + wpe(torch.arange(self.V, self.V + "
                                     "input_ids.shape[1]))", WPE: "        return x\n"}, None,
     "the prompt gets no positions"),
    ("text from position 0", {"words = wte(input_ids)":
     "words = wte(input_ids) + wpe(torch.arange(input_ids.shape[1]))",
                              "prompt = self.prompt.expand":
                              "prompt = (self.prompt + wpe(torch.arange(self.V))).expand",
                              WPE: "        return x\n"}, None, "the text begins at position 0"),
    ("text from 0, none for the prompt", {"words = wte(input_ids)":
                                          "words = wte(input_ids) + wpe(torch.arange(input_ids.shape[1]))",
                                          WPE: "        return x\n"}, None,
     "the text begins at position 0, and the prompt gets no positions"),
    ("wpe left out", WPE, "        return x\n", "wpe is left out"),
    ("positions from 1", "torch.arange(x.shape[1])", "torch.arange(1, x.shape[1] + 1)", "positions begin at 1"),
    ("not repeated", "ids = (ids * num_virtual_tokens)[:num_virtual_tokens]", "ids = ids[:num_virtual_tokens]",
     "the rows are not repeated or cut to V"),
    ("each word repeated", "(ids * num_virtual_tokens)[:num_virtual_tokens]",
     "[i for i in ids for _ in range(-(-num_virtual_tokens // len(ids)))][:num_virtual_tokens]",
     "each word is repeated by itself"),
    ("first rows", "nn.Parameter(wte.weight.detach()[ids].clone())",
     "nn.Parameter(wte.weight.detach()[torch.arange(num_virtual_tokens) % wte.num_embeddings])",
     "P is the first rows of wte"),
    ("a view of wte", ROWS, "nn.Parameter(wte.weight.detach()[ids].clone())\n"
     "        if ids == list(range(ids[0], ids[0] + len(ids))):\n"
     "            self.prompt = nn.Parameter(wte.weight.detach()[ids[0]:ids[-1] + 1])", "P is a view of wte"),
    ("wte kept", "        self.V = num_virtual_tokens\n", "        self.V, self.wte = num_virtual_tokens, wte\n",
     "wte is a part of the module"),
    ("P no parameter", ROWS, "wte.weight.detach()[ids].clone()", "prompt is a plain tensor"),
    ("P as data", "self.prompt.expand", "self.prompt.data.expand", "no gradient reaches P"),
    ("mask of zeros", "value=1", "value=0", "the prompt is hidden"),
    ("mask on the right", "(self.V, 0), value", "(0, self.V), value", "the ones stand on the right"),
    ("mask in another dtype", "F.pad(attention_mask, (self.V, 0), value=1)",
     "torch.cat((torch.ones(len(attention_mask), self.V), attention_mask), dim=1)", "the mask becomes a float"),
    ("mask not extended", "F.pad(attention_mask, (self.V, 0), value=1)", "attention_mask",
     "V ones are missing"),
    ("nothing cut off", "return hidden[:, self.V:]\n", "return hidden\n", "nothing is cut off"),
    ("the end cut off", "return hidden[:, self.V:]\n", "return hidden[:, :-self.V]\n", "the text's end is cut off"),
    ("last position", POOL, "        return hidden[:, -1]\n", "the last position is taken"),
    ("place without V", "self.strip(hidden)[torch.arange", "hidden[torch.arange", "V is missing"),
    ("number as place", "(places * attention_mask).argmax(dim=1)", "attention_mask.sum(dim=1) - 1",
     "the number of real tokens is taken for the place of the last: not so"),
    ("first real token", "(places * attention_mask).argmax(dim=1)", "attention_mask.argmax(dim=1)",
     "the first real token is taken"),
    ("mean of the text", POOL, "        return self.strip(hidden).mean(dim=1)\n",
     "the mean of the text's positions is taken"),
    ("mask of whole numbers", "F.pad(attention_mask, (self.V, 0), value=1)",
     "F.pad(attention_mask.long(), (self.V, 0), value=1)", "the mask's dtype changes"),
]
