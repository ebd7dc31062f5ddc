"""Loads exports of many models: merged weights with transformers, adapters with PEFT.

Usage: python families.py CASES.json, in a folder where the base models' names can be loaded.
CASES.json: [{"base", "merged", "adapter", "pairs": [{"prompt", "chosen", "logps"}]}], with
`adapter` null after a full fine-tune, and `logps` the service's log-probs of the chosen answer's
tokens under the trained weights. If the base model was a GGUF file, a case has in place of `base`
the folder `same_weights`, where the same model is as transformers writes it.
Prints a line for each case; any difference ends the program.
"""

import json
import re
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

torch.set_num_threads(1)
# Parts of a model of text and images that are not its language model, in every layout of files.
OTHER_PARTS = re.compile(r"(^|\.)(visual|vision_tower|multi_modal_projector)\.")
# transformers and Bradley sum in different orders.
TOLERANCE = 1e-5


def load(folder):
    """Loads a model, whose files must have exactly the tensors that the model has."""
    config = AutoConfig.from_pretrained(folder)
    # A config.json made from GGUF has no pad_token_id, so the default of the family's class
    # applies. That token is outside of the vocabulary of a tiny model.
    text = config.get_text_config()
    if text.pad_token_id is not None and text.pad_token_id >= text.vocab_size:
        text.pad_token_id = None
    has_images = hasattr(config, "vision_config")
    loader = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    # The default implementation, SDPA, has no soft-caps on scores.
    options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, info = loader.from_pretrained(folder, config=config, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (folder, problem, info[problem])
    return model.eval()


def token_logps(model, prompt, whole):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].double()
    n = len(prompt)
    logps = torch.log_softmax(logits, -1)[n - 1 : -1]
    return logps.gather(1, torch.tensor(whole[n:])[:, None])[:, 0]


def worst(model, tokenizer, pairs):
    """Returns the largest difference of a token's log-prob from the service's, relative to the
    log-prob where that is beyond -1."""
    worst = 0.0
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"])
        got = token_logps(model, prompt["input_ids"], whole["input_ids"])
        want = torch.tensor(pair["logps"], dtype=torch.float64)
        assert len(got) == len(want), (len(got), len(want))
        worst = max(worst, ((got - want).abs() / want.abs().clamp(min=1)).max().item())
    return worst


def read_weights(folder):
    return {n: t for f in Path(folder).glob("*.safetensors") for n, t in load_file(f).items()}


def check_tensors(name, base_dir, merged_dir, is_trained):
    """Checks that both folders have the same tensors, which are bit-equal except those of the
    language model for which `is_trained` returns True. Returns the number of these."""
    base, merged = read_weights(base_dir), read_weights(merged_dir)
    assert base.keys() == merged.keys(), (name, base.keys() ^ merged.keys())
    trained = 0
    for tensor, before in base.items():
        after = merged[tensor]
        assert (before.dtype, before.shape) == (after.dtype, after.shape), (name, tensor)
        is_equal = torch.equal(before.view(torch.uint8), after.view(torch.uint8))
        if OTHER_PARTS.search(tensor) or not is_trained(tensor):
            assert is_equal, (name, tensor, "was changed")
        else:
            assert not is_equal, (name, tensor, "was not trained")
            trained += 1
    return trained


def load_adapter(base, folder):
    """Loads an adapter onto a whole model, and checks that PEFT gives updates to exactly the linear
    layers of the file."""
    adapted = PeftModel.from_pretrained(base, folder)
    stored = load_file(Path(folder) / "adapter_model.safetensors")
    loaded = {
        n.replace(".default.", "."): p for n, p in adapted.named_parameters() if "lora_" in n
    }
    assert loaded.keys() == stored.keys(), loaded.keys() ^ stored.keys()
    assert all(torch.equal(loaded[n], t) for n, t in stored.items()), folder
    assert not any(OTHER_PARTS.search(n) for n in stored), folder
    modules = {n.removeprefix("base_model.model.").split(".lora_")[0] for n in stored}
    return adapted.eval(), modules


def check(case):
    merged_dir, adapter_dir, pairs = case["merged"], case["adapter"], case["pairs"]
    is_gguf = "same_weights" in case
    name = case["same_weights" if is_gguf else "base"]
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    base, merged = load(name), load(merged_dir)
    # Otherwise, equal log-probs would prove nothing.
    assert worst(base, tokenizer, pairs) > 1e-3, (name, "training changed nothing")
    found, trained = [("merged", worst(merged, tokenizer, pairs))], None
    # A GGUF file has the language model alone, and norms that were rounded.
    assert is_gguf or type(base) is type(merged), (type(base), type(merged))
    if adapter_dir is None:
        trained = check_tensors(name, name, merged_dir, lambda tensor: True)
    elif not is_gguf:
        config = json.loads((Path(adapter_dir) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name, config
        adapted, modules = load_adapter(base, adapter_dir)
        found.append(("peft", worst(adapted, tokenizer, pairs)))
        # Files of models of text and images may have other prefixes.
        ends = tuple("layers." + m.split("layers.")[1] + ".weight" for m in modules)
        trained = check_tensors(name, name, merged_dir, lambda tensor: tensor.endswith(ends))
        assert trained == len(modules), (name, trained, len(modules))
        weights = adapted.merge_and_unload().state_dict()
        for tensor, value in merged.state_dict().items():
            torch.testing.assert_close(value, weights[tensor], rtol=1e-5, atol=1e-6)
    print(name, type(merged).__name__, *found, "trained tensors", trained, flush=True)
    for what, difference in found:
        assert difference < TOLERANCE, (name, what, difference)


for case in json.loads(Path(sys.argv[1]).read_text()):
    check(case)
