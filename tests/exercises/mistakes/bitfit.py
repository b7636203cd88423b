"""Mistakes in BitFit: (title, what stands in the right answer, what instead, what the grader has to say)."""

CHOICE = 'name.split(".")[-1] == "bias" or name.startswith(head + ".")'
COPY = "model.get_parameter(name).detach().clone() for name in trained_names(model, head)"

MISTAKES = [
    ("bias within a name", 'name.split(".")[-1] == "bias"', '"bias" in name',
     "what has bias within its name is trained"),
    ("the head's name as a beginning", 'name.startswith(head + ".")', "name.startswith(head)",
     "what begins with the head's name is trained"),
    ("no head", CHOICE, 'name.split(".")[-1] == "bias"', "the head is missing"),
    ("no LayerNorms", CHOICE, '(name.split(".")[-1] == "bias" and "ln_" not in name) or name.startswith(head + ".")',
     "the LayerNorms' biases are missing"),
    ("LayerNorms' weights, too", CHOICE, CHOICE + ' or "ln_" in name', "the LayerNorms' weights are trained, too"),
    ("attention only", CHOICE, 'name.endswith(("attn.c_attn.bias", "attn.c_proj.bias")) or name.startswith(head + ".")',
     "only attention's biases are trained"),
    ("blocks only", CHOICE, '(name.split(".")[-1] == "bias" and ".h." in name) or name.startswith(head + ".")',
     "the last LayerNorm, ln_f, is missing"),
    ("embeddings, too", CHOICE, CHOICE + ' or "wte" in name or "wpe" in name', "the embeddings are trained, too"),
    ("nothing frozen", "    model.requires_grad_(False)\n", "", "nothing is frozen"),
    ("all frozen", "requires_grad_(True)", "requires_grad_(False)", "all is frozen"),
    ("biases start at zero", "model.get_parameter(name).requires_grad_(True)",
     'model.get_parameter(name).requires_grad_(True)\n        if name.endswith(".bias"):\n'
     "            nn.init.zeros_(model.get_parameter(name))", "the biases are set to zero"),
    ("mean gradient", "output_gradient.sum(dim=(0, 1))", "output_gradient.mean(dim=(0, 1))",
     "the mean over batch and seq"),
    ("sum over batch", "output_gradient.sum(dim=(0, 1))", "output_gradient.sum(dim=0)", "the sum over batch alone"),
    ("sum over all", "output_gradient.sum(dim=(0, 1))", "output_gradient.sum()", "the sum over out, too"),
    ("head not saved", COPY, COPY + ' if not name.startswith(head + ".")', "the head is not saved"),
    ("all saved", "in trained_names(model, head)}", "in model.state_dict()}", "more than what is trained is saved"),
    ("own tensors saved", "model.get_parameter(name).detach().clone() for", "model.get_parameter(name).detach() for",
     "to_save returns the model's own tensors"),
    ("saved with the graph", "model.get_parameter(name).detach().clone() for", "model.get_parameter(name).clone() for",
     "a saved tensor is a part of the graph"),
    ("new Parameters", "            model.get_parameter(name).copy_(values)",
     '            module, _, key = name.rpartition(".")\n'
     "            setattr(model.get_submodule(module), key, nn.Parameter(values.clone()))",
     "load puts new Parameters into the model"),
    ("copied the wrong way", "model.get_parameter(name).copy_(values)", "values.copy_(model.get_parameter(name))",
     "load changes nothing"),
    ("head not loaded", "            model.get_parameter(name).copy_(values)",
     '            if name.endswith(".bias"):\n                model.get_parameter(name).copy_(values)',
     "load leaves the head out"),
]
