"""A small mT5 that has read text and no poses, to start from as from Google's."""

import numpy as np
import sentencepiece
import torch
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Tokenizer,
    get_cosine_schedule_with_warmup,
)

BLOCKS = 4  # encoder and decoder each; mT5-small has 8
IGNORE = -100  # label of padding


def span_corruption(ids, sentinels, rng, noise=0.15, mean_length=3):
    """T5's objective: of a list of ids, 15 % in spans of about 3 give way to sentinels -> (input,
    target).
    """

    def pieces(total, count):
        return np.diff(
            [0, *sorted(rng.choice(np.arange(1, total), count - 1, replace=False)), total]
        )

    masked = max(1, round(noise * len(ids)))
    spans, source, target, at = max(1, round(masked / mean_length)), [], [], 0
    for sentinel, keep, drop in zip(
        sentinels, pieces(len(ids) - masked, spans), pieces(masked, spans)
    ):
        source += ids[at : at + keep] + [sentinel]
        target += [sentinel] + ids[at + keep : at + keep + drop]
        at += keep + drop
    return source, target


def pretrain(folder, texts, steps, batch=32, length=64):
    """A small mT5 that knows text and no poses, saved in mT5's form: spiece.model, config.json,
    weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=4000,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    tokenizer, rng = T5Tokenizer.from_pretrained(folder, extra_ids=0), np.random.default_rng(0)
    pieces, rows = len(tokenizer), tokenizer(texts).input_ids
    sentinels = range(
        pieces, pieces + 30
    )  # behind the pieces' rows, as in mT5; the product cuts them off
    torch.manual_seed(0)
    mt5 = MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=pieces + len(sentinels),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=BLOCKS,
            num_decoder_layers=BLOCKS,
            decoder_start_token_id=0,
        )
    )
    mt5.config.tie_word_embeddings = (
        False  # transformers 5 ties mT5's head; mT5's own is a table of its own
    )
    mt5.lm_head.weight = nn.Parameter(torch.randn(mt5.lm_head.weight.shape) * 128**-0.5)
    optimizer, losses = torch.optim.AdamW(mt5.parameters(), lr=1e-3, weight_decay=0.01), []
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(1, steps + 1):
        pairs = []
        for _ in range(batch):  # texts one behind another, cut to one length
            ids = sum((rows[i] for i in rng.integers(len(rows), size=length // 2)), [])[:length]
            pairs.append(span_corruption(ids, sentinels, rng))
        source, target = (
            nn.utils.rnn.pad_sequence([torch.tensor(ids + [1]) for ids in side], True, padding)
            for side, padding in zip(zip(*pairs), (0, IGNORE))
        )
        loss = mt5(input_ids=source, attention_mask=source != 0, labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(mt5.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(
                f"pre-training step {step} of {steps}: loss {np.mean(losses[-100:]):.3f}",
                flush=True,
            )
    mt5.save_pretrained(folder)
