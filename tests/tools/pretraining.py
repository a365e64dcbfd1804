"""An mT5 that knows text and no poses: small, pre-trained here by T5's span corruption.

The published mT5-small is not at hand offline. What freezing is worth can be asked of this one: its
files have the same form.
"""

import numpy as np
import sentencepiece
import torch
from common import random_mt5
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Tokenizer, get_cosine_schedule_with_warmup

from models_lite import IGNORE

BLOCKS = 4  # of the encoder and of the decoder, each; mT5-small has 8
SENTINELS = 30
PAD = 0
END = 1


def pretrain(folder, texts, steps):
    """Train on these texts and save in mT5's form: spiece.model, config.json, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    train_vocabulary(folder / "spiece.model", texts)
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    pieces = len(tokenizer)
    torch.manual_seed(0)
    mt5 = random_mt5(
        vocab_size=pieces + SENTINELS,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=BLOCKS,
        num_decoder_layers=BLOCKS,
    )
    # sentinels come behind the pieces' rows, as in mT5; the product cuts them off
    sentinels = range(pieces, pieces + SENTINELS)
    train_on_text(mt5, tokenizer(texts).input_ids, sentinels, steps)
    mt5.save_pretrained(folder)


def train_vocabulary(path, texts):
    """A SentencePiece model with mT5's normalisation and special pieces."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=4000,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc",
            pad_id=PAD,
            eos_id=END,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )


def train_on_text(mt5, rows, sentinels, steps):
    """AdamW with warm-up and a cosine; rows are the texts' ids."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(mt5.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    losses = []
    for step in range(1, steps + 1):
        source, target = make_batch(rows, sentinels, rng)
        loss = mt5(input_ids=source, attention_mask=source != PAD, labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(mt5.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = np.mean(losses[-100:])
            print(f"pre-training step {step} of {steps}: loss {recent:.3f}", flush=True)


def make_batch(rows, sentinels, rng, size=32, length=64):
    """-> source (B, L), padded with PAD; target (B, L'), padded with IGNORE."""
    sources = []
    targets = []
    for _ in range(size):
        # texts one behind another, cut to one length
        ids = []
        for i in rng.integers(len(rows), size=length // 2):
            ids += rows[i]
        source, target = span_corruption(ids[:length], sentinels, rng)
        sources.append(torch.tensor(source + [END]))
        targets.append(torch.tensor(target + [END]))
    source = pad_sequence(sources, batch_first=True, padding_value=PAD)  # (B, L)
    target = pad_sequence(targets, batch_first=True, padding_value=IGNORE)  # (B, L')
    return source, target


def span_corruption(ids, sentinels, rng, noise=0.15, mean_length=3):
    """T5's objective: 15 % of a list of ids, in spans of about 3, give way to sentinels.

    -> (input, target). The target names each sentinel and what stood in its place.
    """
    masked = max(1, round(noise * len(ids)))
    spans = max(1, round(masked / mean_length))
    kept_lengths = random_lengths(len(ids) - masked, spans, rng)
    dropped_lengths = random_lengths(masked, spans, rng)
    source = []
    target = []
    at = 0
    for sentinel, kept, dropped in zip(sentinels, kept_lengths, dropped_lengths):
        source += ids[at : at + kept]
        source.append(sentinel)
        at += kept
        target.append(sentinel)
        target += ids[at : at + dropped]
        at += dropped
    return source, target


def random_lengths(total, count, rng):
    """So many lengths, each at least 1, that add up to the total."""
    cuts = rng.choice(np.arange(1, total), count - 1, replace=False)
    return np.diff([0, *sorted(cuts), total])
