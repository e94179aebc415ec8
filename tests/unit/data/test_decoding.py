"""The text of a response is what was sampled: only the token that ended it is taken away."""

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tandem.engine.core.types import Finish
from tandem.engine.data.decoding import response_text

SPECIALS = ["<eos>", "<|im_end|>", "<bos>", "<think>", "</think>", "<answer>", "</answer>", "<pad>"]


def characters(**kwargs):
    """A tokenizer of single characters, and of whole tags that are special tokens."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIALS, "<unk>", *map(chr, range(32, 127))])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        **kwargs,
    )


def words():
    """A WordPiece tokenizer that cleans up spaces when it decodes, unless told not to."""
    vocabulary = {
        token: i for i, token in enumerate(["<eos>", "<unk>", "it", "is", ",", ".", "n't", "4"])
    }
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )


def sampled(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)


@pytest.mark.parametrize(
    "response, finish, text",
    [
        (
            "<think>a</think><answer>4</answer><eos>",
            Finish.STOP,
            "<think>a</think><answer>4</answer>",
        ),
        # a stop token that is not the EOS
        ("<answer>4</answer><|im_end|>", Finish.STOP, "<answer>4</answer>"),
        # cut: its last token is text
        ("<think>a</think>", Finish.LENGTH, "<think>a</think>"),
        ("4</answer>", Finish.LENGTH, "4</answer>"),
        ("4", Finish.LENGTH, "4"),
        # sampled in the middle: shown
        ("a<|im_end|>b<bos><pad><eos>", Finish.STOP, "a<|im_end|>b<bos><pad>"),
        ("<eos>", Finish.STOP, ""),
        ("", Finish.LENGTH, ""),
        ("4<eos>", Finish.LENGTH, "4"),  # a forced prefix that is a whole demonstration
        ("a , b  c !<eos>", Finish.STOP, "a , b  c !"),
        (" a \n<eos>", Finish.STOP, " a <unk>"),
    ],
)
def test_only_the_token_that_ended_a_response_is_taken_away(response, finish, text):
    tokenizer = characters(clean_up_tokenization_spaces=True)
    assert response_text(tokenizer, sampled(tokenizer, response), finish) == text


def test_spaces_are_not_cleaned_up():
    tokenizer = words()
    ids = sampled(tokenizer, "it is , 4 .")
    assert tokenizer.decode(ids) != "it is , 4 ."  # what the tokenizer does by itself
    assert response_text(tokenizer, ids, Finish.LENGTH) == "it is , 4 ."


def test_a_cut_in_the_middle_of_a_character_is_valid_text():
    core = Tokenizer(
        models.BPE(
            {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = sampled(tokenizer, " ok 😀")
    assert response_text(tokenizer, ids, Finish.LENGTH) == " ok 😀"
    assert response_text(tokenizer, ids[:-1], Finish.LENGTH) == " ok \ufffd"
