"""Tiny models and data for the tests, made in the process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "runs",
    "sits",
    "sings",
]
GGUF_FILE = "tiny.gguf"
ARCHITECTURES = ("qwen2_tied", "qwen2_untied", "llama", "qwen2_moe", "gemma2")
# Of single tests: types of their own inside (ernie4_5_moe, dots1), masks that ignore position_ids (opt, falcon,
# bloom, gpt_oss), states that run through a row (lfm2, qwen3_next).
HYBRID = {"lfm2": ["conv", "full_attention"], "qwen3_next": ["linear_attention", "full_attention"]}
OTHERS = ("ernie4_5_moe", "dots1", "opt", "falcon", "bloom", "gpt_oss", "lfm2", "qwen3_next")
# That read images too, whose positions verl has in four rows.
VISION = ("qwen2_vl", "qwen2_5_vl", "glm4v")
# Whose logits are not the product of state and head alone: scaled, or capped.
SCALED = ("granite", "granitemoe", "cohere", "gemma2")


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE):
    """Byte-level BPE over the words of the tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "system user assistant User Assistant", "\n"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template
    return fast


def base_config(name: str, vocab_size: int):
    """The configuration of one of ARCHITECTURES, OTHERS or SCALED, two layers wide 32."""
    from transformers import (
        CohereConfig,
        Gemma2Config,
        GraniteConfig,
        GraniteMoeConfig,
        LlamaConfig,
        Qwen2Config,
        Qwen2MoeConfig,
    )

    if name in OTHERS:
        return _other_config(name, vocab_size)

    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if name == "qwen2_tied":
        return Qwen2Config(**common, tie_word_embeddings=True)
    if name == "qwen2_untied":
        return Qwen2Config(**common, tie_word_embeddings=False)
    if name == "llama":
        return LlamaConfig(**common, tie_word_embeddings=False)
    if name == "gemma2":
        return Gemma2Config(**common, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
    if name == "granite":
        return GraniteConfig(**common, logits_scaling=6.0, residual_multiplier=0.5, embedding_multiplier=3.0)
    if name == "granitemoe":
        return GraniteMoeConfig(**common, logits_scaling=6.0, num_local_experts=4, num_experts_per_tok=2)
    if name == "cohere":
        return CohereConfig(**common, logit_scale=0.25)
    return Qwen2MoeConfig(
        **common,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        tie_word_embeddings=False,
    )


def _other_config(name: str, vocab_size: int):
    import transformers

    layers = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = layers | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    dots = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ernie = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_end_index": 1}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": HYBRID["qwen3_next"]}
    kind, settings = {
        "ernie4_5_moe": ("Ernie4_5_Moe", common | ernie),
        "dots1": ("Dots1", common | experts | dots),
        "opt": ("OPT", layers | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256}),
        "falcon": ("Falcon", layers),
        "bloom": ("Bloom", layers),
        "gpt_oss": ("GptOss", common | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
        "lfm2": ("Lfm2", common | {"block_auto_adjust_ff_dim": False, "layer_types": HYBRID["lfm2"]}),
        "qwen3_next": ("Qwen3Next", common | experts | linear | {"num_experts": 4}),
    }[name]
    return getattr(transformers, f"{kind}Config")(**settings, tie_word_embeddings=False)


def make_base(name: str, folder: Path, tokenizer) -> Path:
    """A base of random weights, saved with its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = base_config(name, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Some have no sdpa, and those that are not told so refuse it.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name in OTHERS else None)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, so that hidden states differ
            if parameter.dim() > 1:
                parameter.mul_(5)
                if not parameter.any():  # routing weights that start at zero
                    parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vision_base(name: str, folder: Path, tokenizer) -> Path:
    """One of VISION with random weights and no processor, saved with its tokenizer."""
    import transformers

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "glm4v": "Glm4v"}[name]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = heads | {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "rope_parameters": rope}
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "embed_dim": 32}
    vision |= {"depth": 1, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_chat_rows(count: int, *, seed: int = 0) -> list[dict]:
    """Conversations of random words, every third with two turns."""
    rng = random.Random(seed)

    def say(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = []
    for i in range(count):
        messages = []
        for _ in range(2 if i % 3 == 0 else 1):
            messages.append({"role": "user", "content": say(1, 6)})
            messages.append({"role": "assistant", "content": say(2, 14)})
        rows.append({"messages": messages})
    return rows


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Rows as a parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_gguf(source: Path, file: Path, *, quantised: bool = False, eos: str | None = None) -> Path:
    """A Qwen2 base of `make_base` with its tokenizer as one GGUF file, exactly or with its matrices in 8 bits; `eos`
    is the end token that the file names instead of the tokenizer's."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    special = set(tokenizer.added_tokens_decoder)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if token in special else 1 for token in range(len(tokenizer))])
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id if eos is None else tokenizer.convert_tokens_to_ids(eos))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, ending = name.rsplit(".", 1)
        name = f"{names.get_name(stem)}.{ending}"
        if quantised and tensor.dim() > 1:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
