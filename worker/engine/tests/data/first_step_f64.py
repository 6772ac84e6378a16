"""Next-token log-probabilities of a Llama-architecture GGUF model in f64, with numpy alone.

An independent check of the engine's arithmetic, written from the architecture's description: no code is shared with it.
Usage: first_step_f64.py MODEL.gguf smollm2_greedy_f32.json > smollm2_first_step_f64.json
"""
import json
import struct
import sys

import numpy as np

KV_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class Reader:
    """Numbers, strings and values of a GGUF header, in order."""

    def __init__(self, data):
        self.data, self.at = data, 4

    def number(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf8", "replace")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(KV_FORMATS[kind])


def dequantize(data, kind, count, at):
    """F32, Q4_1 and Q8_0, the formats of the default model."""
    if kind == 0:
        return np.frombuffer(data, np.float32, count, at).astype(np.float64)
    half = lambda raw: raw.copy().view(np.float16).astype(np.float64)
    if kind == 3:
        blocks = np.frombuffer(data, np.uint8, count // 32 * 20, at).reshape(-1, 20)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
        return codes * half(blocks[:, :2]) + half(blocks[:, 2:4])
    if kind == 8:
        blocks = np.frombuffer(data, np.uint8, count // 32 * 34, at).reshape(-1, 34)
        return blocks[:, 2:].copy().view(np.int8) * half(blocks[:, :2])
    raise ValueError(f"tensor format {kind}")


def read(path):
    data = open(path, "rb").read()
    assert data[:4] == b"GGUF"
    reader = Reader(data)
    reader.number("I")
    tensors, values = reader.number("Q"), reader.number("Q")
    meta = {reader.string(): reader.value(reader.number("I")) for _ in range(values)}
    table = []
    for _ in range(tensors):
        name = reader.string()
        shape = [reader.number("Q") for _ in range(reader.number("I"))]
        table.append((name, shape[::-1], reader.number("I"), reader.number("Q")))
    alignment = meta.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    load = lambda shape, kind, at: dequantize(data, kind, int(np.prod(shape)), start + at).reshape(shape)
    return meta, {name: load(shape, kind, at) for name, shape, kind, at in table}


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, base):
    rows, _, dim = x.shape
    angles = np.arange(rows)[:, None] * base ** (-2 * np.arange(dim // 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def logits(meta, tensors, tokens):
    get = lambda name: meta["llama." + name]
    heads, kv_heads, eps = get("attention.head_count"), get("attention.head_count_kv"), get("attention.layer_norm_rms_epsilon")
    rows, embedding = len(tokens), tensors["token_embd.weight"]
    x = embedding[tokens]
    mask = np.triu(np.full((rows, rows), -np.inf), 1)
    for layer in range(get("block_count")):
        weight = lambda name: tensors[f"blk.{layer}.{name}.weight"]
        h = norm(x, weight("attn_norm"), eps)
        q, k, v = ((h @ weight(name).T).reshape(rows, count, -1) for name, count in [("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)])
        q, k = rope(q, get("rope.freq_base")), rope(k, get("rope.freq_base"))
        out = np.empty_like(q)
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / np.sqrt(q.shape[-1]) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = scores / scores.sum(-1, keepdims=True) @ v[:, shared]
        x = x + out.reshape(rows, -1) @ weight("attn_output").T
        h = norm(x, weight("ffn_norm"), eps)
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    return norm(x[-1], tensors["output_norm.weight"], eps) @ tensors.get("output.weight", embedding).T


def main():
    meta, tensors = read(sys.argv[1])
    cases = []
    for case in json.load(open(sys.argv[2]))["cases"]:
        scores = logits(meta, tensors, case["prompt_tokens"])
        logprobs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        best = np.argsort(-logprobs)[:20]
        cases.append([{"id": int(token), "logprob": round(float(logprobs[token]), 7)} for token in best])
    json.dump(cases, sys.stdout)
    print()


main()
