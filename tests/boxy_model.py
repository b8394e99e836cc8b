"""A random model that is fond of boxes, small enough for real vLLM in tests."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from services.learner.arithmetic_model import build_tokenizer

BOX, SEVEN, END = "\\boxed{", "7", "<|im_end|>"
# What a spelling model likes to write, a byte a token: the first byte at any time, then mostly the next.
SPELLED = ("\\", "b", "o", "x", "e", "d", "{")
FILLINGS = ("7", "é", "你", "🙂")  # one to four bytes, after the brace


def save_model(folder: Path, *, dtype: torch.dtype = torch.float32, spells: bool = False) -> None:
    """Random weights with a bias on a few tokens: an input-independent part of the hidden state lifts their rows.

    spells: it also writes boxes a byte at a time, with characters of several bytes in them. The last part of the hidden
    state says which of their bytes came last, and no layer writes there.
    """
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
        if spells:
            _teach_spelling(model, tokenizer)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _teach_spelling(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    box = [token for character in SPELLED for token in ids(character)]
    follows = dict(zip(box, ([token] for token in box[1:]), strict=False))
    follows[box[-1]] = [ids(filling)[0] for filling in FILLINGS]
    for filling in FILLINGS:
        for token, successor in zip(ids(filling), [*ids(filling)[1:], *ids("}")], strict=True):
            follows[token] = [successor]
    places = range(model.config.hidden_size - len(follows), model.config.hidden_size)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[list(places)] = 0.0
        layer.mlp.down_proj.weight[list(places)] = 0.0
    model.model.embed_tokens.weight[:, list(places)] = 0.0
    model.lm_head.weight[:, list(places)] = 0.0
    model.lm_head.weight[box[0], 0] = 1.3
    for place, (token, successors) in zip(places, follows.items(), strict=True):
        model.model.embed_tokens.weight[token, place] = 4.0
        model.lm_head.weight[successors, place] = 3.5 - model.lm_head.weight[successors, 0]  # all alike
