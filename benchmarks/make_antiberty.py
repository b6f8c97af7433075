"""Writes a masked language model at its full size, and texts for it: AntiBERTy (Ruffolo et al. 2021), 25M, on antibodies.

    pip download --no-deps -d models antiberty==0.1.3; python -m zipfile -e models/antiberty-0.1.3-*.whl models
    python benchmarks/make_antiberty.py models/antiberty models/benchmark-antiberty

The wheel holds weights alone, as a pickle, which is read as tensors and nothing else. The texts are written by the model:
from the heavy chain of trastuzumab on, a quarter of the residues of every sequence is drawn anew from what it predicts, again
and again. All have 120 residues, so that with the two special tokens a window of 122 is a sequence.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

CHAIN = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SEQUENCES = {"calibration": 192, "evaluation": 64}
ROUNDS, SHARE, BATCH = 10, 0.25, 32


def main(source: Path, out: Path) -> None:
    trained = source / "trained_models"
    config = BertConfig.from_pretrained(trained / "AntiBERTy_md_smooth")
    weights = torch.load(trained / "AntiBERTy_md_smooth" / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = BertForMaskedLM(config).eval()
    found = model.load_state_dict(weights, strict=False)
    if found.missing_keys:
        raise SystemExit(f"expected all weights of a masked language model in {source}; missing {found.missing_keys}")
    model.save_pretrained(out)
    tokenizer = tokenizer_of((trained / "vocab.txt").read_text().split())
    tokenizer.save_pretrained(out)
    for seed, (name, count) in enumerate(SEQUENCES.items()):
        written = write(model, tokenizer, count, seed)
        (out / f"{name}.txt").write_text("\n".join(written) + "\n")
        print(f"{name}: {count} sequences, {len(set(written))} of them different")


def tokenizer_of(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A token a letter."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, "[UNK]"))
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@torch.no_grad()
def write(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[str]:
    """Sequences that the model finds likely, by sampling masked residues in turns (Wang and Cho 2019)."""
    random = torch.Generator().manual_seed(seed)
    first = tokenizer.get_vocab()["A"]
    found = []
    for _ in range(0, count, BATCH):
        ids_BL = torch.tensor(tokenizer.encode(CHAIN)).repeat(BATCH, 1)
        for _ in range(ROUNDS):
            masked_BL = torch.rand(ids_BL.shape, generator=random) < SHARE
            masked_BL[:, [0, -1]] = False
            logits_BLV = model(ids_BL.where(~masked_BL, tokenizer.mask_token_id)).logits[..., first:]
            drawn = torch.multinomial(logits_BLV[masked_BL].softmax(-1), 1, generator=random)[:, 0] + first
            ids_BL[masked_BL] = drawn
        found += ["".join(tokenizer.convert_ids_to_tokens(row[1:-1])) for row in ids_BL.tolist()]
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
