"""The demo's model: a Qwen2 of under a million parameters and a tokenizer that knows digits and the dialogue's words.

Random weights; `warmup` teaches it the format and a little addition.
"""

from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_MARKS = ("<|im_start|>", "<|im_end|>")
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


def build_tokenizer() -> Qwen2Tokenizer:
    """ChatML tokenizer: the phrases above and every byte, one token each, no merges.

    A Qwen2Tokenizer, because that is the class in which any loader opens a Qwen2 folder.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(alphabet)},
        merges=[],
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        extra_special_tokens=list(TURN_MARKS),
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in PHRASES])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, *, context: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights: hidden 128, 2 layers, 4 heads of 32, tied head; fp32."""
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,  # whole GEMM tiles
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)
