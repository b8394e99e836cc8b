"""A random model that is fond of boxes, small enough for real vLLM in tests."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from services.learner.arithmetic_model import build_tokenizer

BOX, SEVEN, END = "\\boxed{", "7", "<|im_end|>"


def save_model(folder: Path) -> None:
    """Random weights with a bias on a few tokens: an input-independent part of the hidden state lifts their rows."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=False, initializer_range=0.1))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for text, lift in ((BOX, 1.3), (SEVEN, 1.3), ("}", 1.3), (END, 1.1)):
            [token] = tokenizer.encode(text, add_special_tokens=False)
            model.lm_head.weight[token, 0] = lift
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
