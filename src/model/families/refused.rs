//! Well-known models that are refused, each with the reason.

const MIXTURE: &str =
    "it is a mixture of experts, and only dense feed-forward parts are implemented";
const HYBRID: &str = "it has state-space, recurrent, convolutional or linear-attention layers, \
                      and only softmax attention is implemented";
const ENCODER_DECODER: &str = "it is an encoder-decoder, and only decoders are implemented";
const ENCODER: &str = "it is an encoder, and only causal language models are implemented";
const LAYER_NORM: &str = "its norms are not RMSNorms, and only these are implemented";
const LATENT: &str = "it has multi-head latent attention, which is not implemented";
const PER_LAYER: &str = "it has separate embeddings for each layer, or layers that share keys and \
                         values, which is not implemented";
const GEMMA: &str = "the first Gemma is not implemented; Gemma 2 and 3 are";
const IMAGES: &str = "of models of text and images or sound, only the text of the ones listed here \
                      is implemented";

/// Reasons, each with the names of the models as `model_type` and llama.cpp spell them, in lower
/// case and without separators.
const REASONS: [(&str, &[&str]); 9] = [
    (
        MIXTURE,
        &[
            "mixtral",
            "gptoss",
            "deepseek",
            "deepseekv2",
            "deepseekv3",
            "deepseekv32",
            "deepseek2",
            "llama4",
            "llama4text",
            "dbrx",
            "arctic",
            "grok",
            "minimax",
            "minimaxm2",
            "dots1",
            "longcatflash",
            "mistral4",
            "switchtransformers",
            "nllbmoe",
        ],
    ),
    (
        HYBRID,
        &[
            "qwen3next",
            "qwen35",
            "qwen35text",
            "falconh1",
            "jamba",
            "bamba",
            "granitemoehybrid",
            "granitehybrid",
            "zamba",
            "zamba2",
            "nemotronh",
            "lfm2",
            "recurrentgemma",
            "mamba",
            "mamba2",
            "falconmamba",
            "rwkv",
            "rwkv6",
            "rwkv7",
            "kimilinear",
            "olmohybrid",
            "plamo2",
        ],
    ),
    (
        ENCODER_DECODER,
        &[
            "t5",
            "t5encoder",
            "mt5",
            "umt5",
            "longt5",
            "t5gemma",
            "t5gemma2",
            "bart",
            "mbart",
            "pegasus",
            "marian",
            "m2m100",
            "led",
            "blenderbot",
            "prophetnet",
            "whisper",
        ],
    ),
    (
        ENCODER,
        &[
            "bert",
            "nomicbert",
            "roberta",
            "xlmroberta",
            "distilbert",
            "deberta",
            "debertav2",
            "electra",
            "albert",
            "modernbert",
            "mpnet",
            "gemmaembedding",
        ],
    ),
    (
        LAYER_NORM,
        &[
            "gpt2",
            "gptneo",
            "gptneox",
            "gptj",
            "opt",
            "bloom",
            "falcon",
            "phi",
            "phi2",
            "stablelm",
            "starcoder",
            "starcoder2",
            "gptbigcode",
            "cohere",
            "cohere2",
            "commandr",
            "mpt",
            "olmo",
            "nemotron",
            "persimmon",
            "codegen",
        ],
    ),
    (LATENT, &["minicpm3"]),
    (
        PER_LAYER,
        &["gemma3n", "gemma3ntext", "gemma4", "gemma4text"],
    ),
    (GEMMA, &["gemma"]),
    (
        IMAGES,
        &[
            "llava",
            "llavanext",
            "llavaonevision",
            "idefics2",
            "idefics3",
            "smolvlm",
            "internvl",
            "mllama",
            "paligemma",
            "pixtral",
            "glm4v",
            "qwen25omni",
            "qwen3omnimoe",
            "qwen2audio",
            "phi4multimodal",
            "voxtral",
            "aria",
            "ayavision",
            "cohere2vision",
        ],
    ),
];

/// Returns the reason why a model with this `model_type`, or with this architecture in llama.cpp,
/// is refused. `None` if there is nothing to say but that it is not implemented.
pub fn reason(name: &str) -> Option<&'static str> {
    let plain: String = name
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let listed = REASONS
        .iter()
        .find(|(_, names)| names.contains(&plain.as_str()))
        .map(|(reason, _)| *reason);
    // Mixtures of experts usually say so in their names.
    listed.or_else(|| plain.contains("moe").then_some(MIXTURE))
}
