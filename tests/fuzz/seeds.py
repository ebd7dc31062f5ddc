"""Writes tests/fuzz/corpus, small valid and invalid files, and the files of tests/goldens/parquet.

The parser must accept NAME.ok and refuse NAME.refused (tests/it/corpus.rs). Inputs that fuzzing
found are named regression-N.ok or regression-N.refused; they stay. Needs gguf, numpy, safetensors
and pyarrow (`pip install gguf numpy safetensors pyarrow`).
"""

import json
import pathlib

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

HERE = pathlib.Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
GOLDENS = HERE.parent / "goldens"


def put(target, name, data, within=CORPUS):
    path = within / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tiny_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("seed")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<s>", "</s>", "H", "e", "l", "o", "He", "ll", "Ġ", ","]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 8)
    writer.add_token_merges(["H e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    shapes = {
        "token_embd": (10, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
    }
    shapes |= {
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (8, 8),
        "blk.0.ffn_up": (8, 8),
        "blk.0.ffn_down": (8, 8),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Everything but the inputs that fuzzing found is written again.
for path in CORPUS.glob("*/*"):
    if not path.name.startswith("regression"):
        path.unlink()
for file in ("pairs", "plain"):
    for i, line in enumerate((GOLDENS / f"{file}.jsonl").read_text().splitlines()[:4]):
        put("rows", f"{file}-{i}.ok", line + "\n")
put("rows", "deep.refused", "[" * 5000)
put(
    "rows",
    "several.refused",
    '{"chosen": "a", "rejected": "b"}\n\n{"prompt": 1}\n'
    '{"prompt": "p", "chosen": "a", "rejected": "b", "weight": 1e999}\n\xff',
)
put(
    "rows",
    "implicit.ok",
    json.dumps(
        {
            s: [{"role": "user", "content": "q"}, {"role": "assistant", "content": s}]
            for s in ("chosen", "rejected")
        }
    ),
)

rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0.5}] * 3
chats = [
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "q"}],
    }
]
for name, table in (("plain", rows), ("chat", chats)):
    for compression in ("none", "snappy", "zstd"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(table), sink, compression=compression)
        put("parquet", f"{name}-{compression}", sink.getvalue().to_pybytes(), within=GOLDENS)

(CORPUS / "gguf").mkdir(parents=True, exist_ok=True)
tiny_gguf(CORPUS / "gguf" / "llama.ok")
put(
    "safetensors",
    "pair.refused",
    save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}),
)
put(
    "safetensors", "adapter.ok", (GOLDENS / "adapters/llama/adapter_model.safetensors").read_bytes()
)
put("safetensors", "huge-header.refused", b"\xff" * 7 + b"\x7f" + b"{}")
put(
    "safetensors",
    "far-offsets.refused",
    (lambda h: len(h).to_bytes(8, "little") + h)(
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],'
        b'"data_offsets":[0,18446744073709551615]}}'
    ),
)
for model in ("llama", "mistral", "qwen2", "qwen3"):
    put(
        "adapter_config",
        f"{model}.ok",
        (GOLDENS / f"adapters/{model}/adapter_config.json").read_bytes(),
    )
    put("model_config", f"{model}.ok", (GOLDENS / f"models/{model}/config.json").read_bytes())
    put(
        "chat_template",
        f"{model}.ok",
        (GOLDENS / f"models/{model}/chat_template.jinja").read_bytes(),
    )
put("chat_template", "include.refused", "{% include '/etc/passwd' %}{% import 'x' as y %}")
put(
    "chat_template",
    "endless.refused",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * 'x' }}{% endfor %}{% endfor %}",
)
put(
    "chat_template",
    "methods.refused",
    "{{ messages[0].content.strip().split('|')[-1] | tojson(indent=2) }}"
    "{{ raise_exception('no') }}{{ strftime_now('%Y') }}",
)
put(
    "model_config",
    "scaled.ok",
    json.dumps(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 100,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        }
    ),
)
small = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 0,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "post_processor": None,
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    },
    "truncation": None,
    "padding": None,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "H": 1, "e": 2, "He": 3},
        "merges": [["H", "e"]],
    },
}
put("tokenizer", "llama.ok", (GOLDENS / "models/llama/tokenizer.json").read_bytes())
put("tokenizer", "bpe.ok", json.dumps(small))
put(
    "tokenizer",
    "regex.ok",
    json.dumps(
        dict(
            small,
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            },
        )
    ),
)
put(
    "settings",
    "all.ok",
    'models = ["a=/x", "b.gguf"]\nlisten = "0.0.0.0:1"\nmemory_limit = "20GiB"\n'
    'scoring_share = 0.5\nauth = "tokens"\nthreads = 2\n',
)
put(
    "settings",
    "wrong.refused",
    "drain_timeout = -1\nunknown = {}\nmodels = 3\n[table]\nx = 1979-05-27",
)
