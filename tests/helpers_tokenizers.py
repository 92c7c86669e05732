"""Small tokenizer folders of every kind, and transformers' LlamaTokenizer of a sentencepiece model."""

import json

import sentencepiece
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers_models import tokenizer_bytes

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "what is the plural of mouse",
    "für Straße 日本 🎉",
] * 3


def llama2_json():
    """As Llama 2's: a prepended space, byte fallback, a decoder that strips it again, BOS from the
    post-processor."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "f"), ("▁", "of"), ("▁", "p"), ("▁", "▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,:ß日", *(a + b for a, b in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    fast = Fast(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast


def bytes_json(specials=(), bos=None):
    """Byte-level BPE as GPT-2's; with `bos` as Llama 3's."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=307, special_tokens=list(specials), initial_alphabet=alphabet)
    fast.train_from_iterator(LINES, trainer)
    if bos:
        template = {"single": f"{bos} $A", "special_tokens": [(bos, fast.token_to_id(bos))]}
        fast.post_processor = processors.TemplateProcessing(**template)
    return fast


def write_tokenizer(folder, kind, **config):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    elif kind == "llama2":
        llama2_json().save(str(folder / "tokenizer.json"))
    elif kind == "llama3":
        specials = ["<|begin_of_text|>", "<|end_of_text|>"]
        bytes_json(specials, specials[0]).save(str(folder / "tokenizer.json"))
    else:
        bytes_json(["<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def transformers_llama(folder):
    """transformers' LlamaTokenizer of a folder with a tokenizer.model.

    Without protobuf it can't read that file. So it gets the same pieces as a tokenizer.json, which
    is not for us to read: it is gone when this returns.
    """
    from helpers_oracles import LlamaTokenizer, generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scores = {pieces.id_to_piece(j): pieces.get_score(j) for j in range(len(pieces))}
    vocab = {piece: j for j, piece in enumerate(scores)}
    fast = Fast(models.BPE(vocab, generate_merges(vocab, scores)))
    fast.add_special_tokens([piece for piece, j in vocab.items() if pieces.is_control(j)])
    file = folder / "tokenizer.json"
    fast.save(str(file))
    try:
        return LlamaTokenizer.from_pretrained(folder)
    finally:
        file.unlink()
