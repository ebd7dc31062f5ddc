"""Writes parameters.json: the parameters of every family, as other tools name and treat them. Run: python parameters.py.

Names and shapes are transformers', GGUF's names are those of llama.cpp's gguf package, `decays` is what transformers' Trainer gives weight decay,
adapters are PEFT's.
"""

import json

import gguf
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Trainer,
)

from common import HERE

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The names that the families with fused matrices have instead.
FUSED = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
SHAPE = dict(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LLAMA, QWEN2, QWEN3 = gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3
GEMMA2, GEMMA3 = gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3
PHI3, GLM4 = gguf.MODEL_ARCH.PHI3, gguf.MODEL_ARCH.GLM4
SMOLLM3, GRANITE, OLMO2 = gguf.MODEL_ARCH.SMOLLM3, gguf.MODEL_ARCH.GRANITE, gguf.MODEL_ARCH.OLMO2
# Heads that are not C / heads wide, ties, biases and windows.
CASES = [
    ("llama, tied", LLAMA, LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    ("llama with biases", LLAMA, LlamaConfig(**SHAPE, head_dim=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    ("mistral", LLAMA, MistralConfig(**SHAPE, sliding_window=16, tie_word_embeddings=False)),
    ("qwen2, tied", QWEN2, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    ("qwen2 with windows", QWEN2, Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1, tie_word_embeddings=False)),
    ("qwen3", QWEN3, Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=False)),
    ("qwen3 with biases, tied", QWEN3, Qwen3Config(**SHAPE, head_dim=6, attention_bias=True, tie_word_embeddings=True)),
    ("gemma3, tied", GEMMA3, Gemma3TextConfig(**SHAPE, head_dim=6, sliding_window=16, tie_word_embeddings=True)),
    ("gemma2, tied", GEMMA2, Gemma2Config(**SHAPE, head_dim=6, sliding_window=16, tie_word_embeddings=True)),
    ("phi3", PHI3, Phi3Config(**SHAPE, pad_token_id=None)),
    ("glm4 with biases", GLM4, Glm4Config(**SHAPE, head_dim=8, pad_token_id=None)),
    ("smollm3 with biases", SMOLLM3, SmolLM3Config(**SHAPE, head_dim=6, attention_bias=True, mlp_bias=True, pad_token_id=None, tie_word_embeddings=False)),
    ("granite, tied", GRANITE, GraniteConfig(**SHAPE, tie_word_embeddings=True)),
    ("olmo2 with biases", OLMO2, Olmo2Config(**SHAPE, head_dim=6, attention_bias=True)),
    # llama.cpp has no architecture of its own for OLMo 3.
    ("olmo3, tied", OLMO2, Olmo3Config(**SHAPE, sliding_window=16, tie_word_embeddings=True)),
    ("ministral, tied", LLAMA, MinistralConfig(**SHAPE, head_dim=6, sliding_window=16, tie_word_embeddings=True)),
    ("ministral3", gguf.MODEL_ARCH.MISTRAL3, Ministral3Config(**SHAPE, head_dim=6, tie_word_embeddings=False)),
]


def case(name, architecture, config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gguf_names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    decayed = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model))
    parameters = [
        dict(name=n, gguf=gguf_names.get_name(n, try_suffixes=(".weight", ".bias")), shape=list(p.shape), decays=n in decayed)
        for n, p in model.named_parameters()
    ]
    text = config.to_json_string()
    adapters = []
    for rank, targets in ((4, FUSED.get(config.model_type, TARGETS)), (3, ["q_proj", "down_proj"])):
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
            adapted = get_peft_model(base, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
        tensors = {n: list(t.shape) for n, t in get_peft_model_state_dict(adapted).items()}
        adapters.append(dict(rank=rank, target_modules=targets, tensors=tensors))
    return dict(name=name, config=json.loads(text), parameters=parameters, adapters=adapters)


def write(cases):
    """One line for each tensor, so that a difference can be read."""
    lines = lambda rows: ",\n".join("   " + json.dumps(row) for row in rows)
    texts = []
    for c in cases:
        adapters = ",\n".join(
            f'  {{"rank": {a["rank"]}, "target_modules": {json.dumps(a["target_modules"])}, "tensors": [\n{lines(list(a["tensors"].items()))}]}}'
            for a in c["adapters"]
        )
        texts.append(
            f' {{"name": {json.dumps(c["name"])},\n  "config": {json.dumps(c["config"], sort_keys=True)},\n'
            f'  "parameters": [\n{lines(c["parameters"])}],\n  "adapters": [\n{adapters}]}}'
        )
    (HERE / "parameters.json").write_text("[\n" + ",\n".join(texts) + "\n]\n")


if __name__ == "__main__":
    write([case(*c) for c in CASES])
