"""Tiny random models, their tokenizers, and TRL trainers set up so that every number is reproducible."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolLM3Config,
)
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
MODELS = HERE / "models"
torch.set_num_threads(1)

CORPUS = """The river rises in the hills and flows past the old mill. Bread needs flour, water, salt and time.
A prime number has exactly two divisors. Light travels faster than sound. Water boils at lower temperatures on mountains.
What is the capital of France? Paris. How many legs has a spider? Eight. Name a colour. Blue, green or red.
You could say that it depends, and of course I would be happy to help with that question! Thank you for asking.
Write a function that adds two numbers: def add(a, b): return a + b. 1 2 3 4 5 6 7 8 9 10 11 12 42 100.
She sells sea shells. He'll go; they've gone, we're here, I'd stay. Das ist schön. Où est-ce? naïve café.
""".splitlines()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
    "    {{- message['content'] | trim }}\n    {{- '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


def tokenizer(template, specials, bos, eos, add_bos):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


COMMON = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512
)
# Context of the pretrained model with longrope, about as long as the sequences of pairs.jsonl.
LONGROPE_CONTEXT = 50
QWEN3_VISION = dict(
    depth=1, hidden_size=8, intermediate_size=16, num_heads=2, patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0]
)
TOWER = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, patch_size=2)
SHAPES = {
    "llama": lambda: (
        LlamaConfig(
            **COMMON,
            num_hidden_layers=3,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            rope_scaling=dict(
                rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        ),
        tokenizer(LLAMA3, ["<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "<|begin|>", "<|eot_id|>", True),
    ),
    "mistral": lambda: (
        MistralConfig(**COMMON, num_hidden_layers=2, tie_word_embeddings=False, sliding_window=16),
        tokenizer(INST, ["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
    ),
    "qwen2": lambda: (
        Qwen2Config(**COMMON, num_hidden_layers=2, tie_word_embeddings=True),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "qwen3": lambda: (
        Qwen3Config(**COMMON, num_hidden_layers=2, tie_word_embeddings=False, head_dim=16),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # A window and frequencies of its own on the first layer; scores that are not scaled by 1 / sqrt(head_dim).
    "gemma3": lambda: (
        Gemma3TextConfig(
            **COMMON,
            num_hidden_layers=2,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Soft-caps that are as small as the scores and logits of a random model, so that they change the results.
    "gemma2": lambda: (
        Gemma2Config(
            **COMMON,
            num_hidden_layers=2,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=3.0,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Heads for tensor cores, one key head for all query heads, an output head that is not tied, three layers.
    "gemma2-64": lambda: (
        Gemma2Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=3,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=20,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=4.0,
            tie_word_embeddings=False,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Plain frequencies on all dimensions, a window.
    "phi3": lambda: (
        Phi3Config(**COMMON, num_hidden_layers=2, sliding_window=16),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # longrope on three quarters of each head; some sequences are longer than the pretrained context, and of some pairs only one.
    "phi3-long": lambda: (
        Phi3Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64},
            num_hidden_layers=2,
            tie_word_embeddings=True,
            original_max_position_embeddings=LONGROPE_CONTEXT,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                short_factor=[1 + 0.05 * i for i in range(12)],
                long_factor=[1 + 0.4 * i for i in range(12)],
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "glm4": lambda: (
        Glm4Config(**COMMON, num_hidden_layers=2, head_dim=8, attention_bias=False, tie_word_embeddings=True),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Heads for tensor cores, a quarter of each rotated, biases.
    "glm4-64": lambda: (
        Glm4Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=2,
            head_dim=64,
            attention_bias=True,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0, partial_rotary_factor=0.25),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # No rotation on the last layer.
    "smollm3": lambda: (
        SmolLM3Config(
            **COMMON,
            num_hidden_layers=4,
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Windows on the layers without a rotation, biases everywhere.
    "smollm3-64": lambda: (
        SmolLM3Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=3,
            head_dim=64,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=20,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Multipliers that change the results of a random model.
    "granite": lambda: (
        GraniteConfig(
            **COMMON,
            num_hidden_layers=2,
            embedding_multiplier=3.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "granite-64": lambda: (
        GraniteConfig(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=3,
            head_dim=64,
            embedding_multiplier=12,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=0.7,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Norms on all heads at once, and only on the outputs of the parts.
    "olmo2": lambda: (
        Olmo2Config(
            **COMMON,
            num_hidden_layers=2,
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "olmo2-64": lambda: (
        # Six heads of 64 are wider than a warp's registers.
        Olmo2Config(
            **{**COMMON, "num_attention_heads": 6, "num_key_value_heads": 2},
            num_hidden_layers=2,
            head_dim=64,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Three layers with a window and one without.
    "olmo3": lambda: (
        Olmo3Config(
            **COMMON,
            num_hidden_layers=4,
            sliding_window=16,
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # YaRN on the layer without a window.
    "olmo3-64": lambda: (
        Olmo3Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=2,
            head_dim=64,
            sliding_window=20,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32),
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "ministral": lambda: (
        MinistralConfig(
            **COMMON,
            num_hidden_layers=2,
            head_dim=16,
            sliding_window=16,
            tie_word_embeddings=False,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "ministral-64": lambda: (
        MinistralConfig(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=2,
            head_dim=64,
            sliding_window=20,
            layer_types=["full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Queries are scaled from position 16 on.
    "ministral3": lambda: (
        Ministral3Config(
            **COMMON,
            num_hidden_layers=2,
            head_dim=16,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0,
                llama_4_scaling_beta=0.3,
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "ministral3-64": lambda: (
        Ministral3Config(
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
            num_hidden_layers=2,
            head_dim=64,
            sliding_window=20,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.5,
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # Models of text and images. The three sections of a position (mrope_section) add up to the number of rotary frequencies.
    "qwen2_vl": lambda: (
        Qwen2VLConfig(
            text_config=dict(
                **COMMON,
                num_hidden_layers=3,
                use_sliding_window=True,
                sliding_window=16,
                max_window_layers=1,
                rope_parameters=dict(rope_type="mrope", rope_theta=10000.0, mrope_section=[1, 1, 2]),
            ),
            vision_config=dict(depth=1, embed_dim=8, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=2),
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "qwen2_5_vl": lambda: (
        Qwen2_5_VLConfig(
            text_config=dict(
                **{**COMMON, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64},
                num_hidden_layers=2,
                rope_parameters=dict(
                    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, mrope_section=[8, 12, 12]
                ),
            ),
            vision_config=dict(
                depth=1, hidden_size=8, intermediate_size=16, num_heads=2, patch_size=2, out_hidden_size=64, fullatt_block_indexes=[0]
            ),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "qwen3_vl": lambda: (
        Qwen3VLConfig(
            text_config=dict(
                **COMMON,
                num_hidden_layers=2,
                head_dim=16,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True),
            ),
            vision_config=QWEN3_VISION | dict(out_hidden_size=32),
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "qwen3_vl-64": lambda: (
        Qwen3VLConfig(
            text_config=dict(
                **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1},
                num_hidden_layers=2,
                head_dim=64,
                attention_bias=True,
                rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0, mrope_section=[12, 10, 10]),
            ),
            vision_config=QWEN3_VISION | dict(out_hidden_size=32),
            tie_word_embeddings=True,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    "gemma3-images": lambda: (
        Gemma3Config(
            text_config=dict(**COMMON, num_hidden_layers=2, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
            vision_config=TOWER | dict(image_size=4),
            mm_tokens_per_image=4,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
    # The layers of its vision tower have the names of those of its text.
    "mistral3-images": lambda: (
        Mistral3Config(
            text_config=dict(model_type="mistral", **COMMON, num_hidden_layers=2, head_dim=16, sliding_window=None, tie_word_embeddings=False),
            vision_config=TOWER | dict(model_type="pixtral", head_dim=4, image_size=4),
            tie_word_embeddings=False,
        ),
        tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", False),
    ),
}
# Models of text and images, whose text alone is trained.
WITH_IMAGES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl-64", "gemma3-images", "mistral3-images"]
# Models whose norms multiply by 1 + w.
ADDS_ONE = ["gemma3", "gemma2", "gemma2-64", "gemma3-images"]


def randomise(model, seed, norm=1):
    """Draws every weight from N(0, 0.15²), those of norms around `norm`, so that logits vary and no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.15
            p.copy_(norm + noise if "norm" in name else noise)


def loader(name):
    return AutoModelForImageTextToText if name in WITH_IMAGES else AutoModelForCausalLM


def build(name, seed, folder):
    config, tok = SHAPES[name]()
    for part in (config, config.get_text_config()):
        part.bos_token_id, part.eos_token_id, part.pad_token_id = tok.bos_token_id, tok.eos_token_id, tok.pad_token_id
    model = loader(name).from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed, norm=0 if name in ADDS_ONE else 1)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def load(name):
    model = loader(name).from_pretrained(MODELS / name, attn_implementation="eager", dtype=torch.float32)
    tok = PreTrainedTokenizerFast.from_pretrained(MODELS / name)
    return model, tok


def rows(file):
    return [json.loads(line) for line in (HERE / file).read_text().splitlines() if line.strip()]


def strip(row):
    return {k: v for k, v in row.items() if k in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")}


def trainer(model, tok, data, ref=None, peft_config=None, out="/tmp/bradley-goldens", **settings):
    defaults = dict(
        output_dir=out,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=256,
        seed=42,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    args = DPOConfig(**{**defaults, **settings})
    # torch drops the input-side gradient of the embedding's padding_idx row. Here, as in SmolLM2, padding and end-of-turn are one token, which
    # also occurs inside dialogues, so what is dropped is a true gradient. Bradley keeps it; the goldens must too.
    model.get_input_embeddings().padding_idx = None
    dataset = Dataset.from_list([strip(r) for r in data])
    return DPOTrainer(model=model, ref_model=ref, args=args, train_dataset=dataset, processing_class=tok, peft_config=peft_config)
