"""Tiny random models in Hugging Face's layout, and what transformers makes of them: the reference of tests/architectures.rs.

    pip install torch transformers && python make_tiny_models.py

One model per architecture, each with the settings in which it differs from the others. Weights are random, from a fixed seed,
and rounded to the format of the file; the reference is computed from the rounded ones in f32, without a cache. Beside the
weights lies `reference.json`: a prompt longer than any sliding window, its tokens, the greedy tokens behind it, and the logits
of the first of them. The two likeliest tokens are never close, so that greedy texts must be the same.
"""

import json
import pathlib
import shutil

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

HERE = pathlib.Path(__file__).parent / "tiny"
VOCABULARY = 320
NEW_TOKENS = 24
# How far the likeliest token must be ahead of the second, as a share of the largest logit.
MARGIN = 0.01
# How many of the new tokens must differ: a text that turns in a circle early hides faults.
DISTINCT = 14
PROMPT = (
    "The harbour lay still under the morning fog, and the old keeper counted the ships that had not come home: "
    "seven, then six, then none at all. \u00c9t\u00e9 comme hiver, 12 lights burn."
)

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def theta(base, **scaling):
    return {"rope_type": "default", "rope_theta": base} | scaling


# Configuration, format of the weights, largest shard.
MODELS = {
    "llama": (
        LlamaConfig(
            **SIZES | dict(max_position_embeddings=1024),
            tie_word_embeddings=False,
            rope_parameters=theta(
                500000.0,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        torch.bfloat16,
        "1GB",
    ),
    "mistral": (
        MistralConfig(**SIZES, tie_word_embeddings=True, sliding_window=13, rope_parameters=theta(10000.0)),
        torch.float16,
        "1GB",
    ),
    "qwen2": (
        Qwen2Config(**SIZES, tie_word_embeddings=True, use_sliding_window=False, rope_parameters=theta(1e6)),
        torch.float32,
        "1GB",
    ),
    "qwen3": (
        Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=32, rope_parameters=theta(1e6)),
        torch.bfloat16,
        "80KB",
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SIZES | dict(num_hidden_layers=4, num_key_value_heads=1),
            head_dim=32,
            tie_word_embeddings=True,
            query_pre_attn_scalar=24,
            sliding_window=11,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": theta(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": theta(10000.0),
            },
        ),
        torch.bfloat16,
        "1GB",
    ),
}


def tokenizer():
    """A byte-level BPE with a few merges, learned from the prompt, that begins texts with a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [PROMPT],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert bpe.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def randomise(model, seed, dtype):
    """Weights that let tokens differ much, rounded to `dtype`: none is left at what transformers begins training with."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                # Gemma adds 1 to it.
                weight.copy_(torch.randn_like(weight) * 0.3 + (0 if model.config.model_type.startswith("gemma") else 1))
            elif name.endswith("bias"):
                weight.copy_(torch.randn_like(weight) * 0.5)
            elif "embed_tokens" in name:
                # Small, since they are added to: what the layers do must show in the text. Gemma scales them up.
                scale = model.config.hidden_size**0.5 if model.config.model_type.startswith("gemma") else 1
                weight.copy_(torch.randn_like(weight) * 0.3 / scale)
            else:
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[1] ** 0.5)
            # Not all of the model: the rotary frequencies stay as they are.
            weight.copy_(weight.to(dtype))


@torch.no_grad()
def reference(model, prompt):
    """Greedy tokens and the first one's logits; `None` where two tokens are close or the text ends early or repeats itself."""
    tokens, first = list(prompt), None
    while len(tokens) < len(prompt) + NEW_TOKENS:
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        first = logits if first is None else first
        best, second = logits.topk(2).values
        token = int(logits.argmax())
        if best - second < MARGIN * logits.abs().max() or token in (0, 1):
            return None
        tokens.append(token)
    new = tokens[len(prompt) :]
    return (new, first) if len(set(new)) >= DISTINCT else None


def make(name, config, dtype, shard_size):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    words = tokenizer()
    prompt = words(PROMPT)["input_ids"]
    for seed in range(500):
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model, seed, dtype)
        found = reference(model, prompt)
        if found:
            break
    else:
        raise SystemExit(f"{name}: no seed will do")
    tokens, logits = found
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    words.save_pretrained(folder)
    text = {
        "prompt": PROMPT,
        "prompt_tokens": prompt,
        "tokens": tokens,
        "text": words.decode(tokens),
        "logits": [round(float(x), 5) for x in logits],
    }
    (folder / "reference.json").write_text(json.dumps(text) + "\n")
    print(name, "seed", seed, "tokens", len(prompt), tokens, "logits to", float(logits.abs().max()))


if __name__ == "__main__":
    for name, (config, dtype, shard_size) in MODELS.items():
        make(name, config, dtype, shard_size)
