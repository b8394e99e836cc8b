"""The demo's model: a Qwen2 of under a million parameters and a tokenizer that knows digits and the dialogue's words.

Random weights; `warmup` teaches it the format and a little addition.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Whole phrases of the default dialogue are one token each: the demo's tokens go to arithmetic, not to English.
PHRASES = (
    "Your answer is incorrect.",
    "Your answer was not accepted.",
    "No boxed answer was found.",
    "You have ",
    " attempts",
    " attempt",
    " left.",
    " Try an alternative.",
    " Try again.",
    "\\boxed{",
    "system\n",
    "user\n",
    "assistant\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML tokenizer: the phrases above and every printable ASCII character, one token each."""
    vocabulary = [*SPECIALS, *PHRASES, *(c for c in string.printable if c not in "\r\v\f")]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIALS[0]))
    escaped = "|".join(_escape(phrase) for phrase in PHRASES)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{escaped}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        additional_special_tokens=list(SPECIALS[1:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, *, context: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights: hidden 128, 3 layers, 4 heads of 32, tied head; fp32."""
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,  # whole GEMM tiles
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def _escape(phrase: str) -> str:
    return "".join(f"\\{c}" if c in "\\.{}|()[]*+?^$" else c for c in phrase)
