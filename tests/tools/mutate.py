"""Do the tests bite? Faults planted one at a time, and whether the tests that should notice do.

    python tests/tools/mutate.py                     all of TABLE, 8 minutes on one core
    python tests/tools/mutate.py augment test_bites  those whose fault or tests hold such a word

A copy of the repository is changed, never the repository. A text that does not stand exactly once
in its file, or tests that fail without any fault, end it before the first fault, with exit code 1,
as does a fault that survives and has no reason in TABLE. Not on Windows: every fault's tests are
forked off.
"""

import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180  # a fault under which its tests run for ever counts as noticed

# ---------------------------------------------------------------------- the table

BITES = "tests/test_bites.py -k "
CONFIG = "tests/test_config.py -k "
DATASETS = "tests/test_datasets.py -k "
FUZZ = "tests/test_fuzz.py -k "
MODELS = "tests/test_models.py -k "
TRAIN = "tests/test_train.py -k "
# file -> tests -> [(text, what stands in its place)]; a third item is the reason why it may survive
TABLE = {
    "config_lite.py": {
        BITES + "epochs_may": [("if not self.epochs and not self.max_steps:", "if False:")],
        BITES + "defaults": [
            ("batch_size: int = option(2,", "batch_size: int = option(1,"),
            ("accumulation: int = option(16,", "accumulation: int = option(8,"),
            ("epochs: int = option(50,", "epochs: int = option(40,"),
            ('2e-4, "peak rate', '1e-3, "peak rate'),
            ("decay: float = option(0.01,", "decay: float = option(0.1,"),
            ("norm: float = option(1.0,", "norm: float = option(0.0,"),
            ('5, "linear warm-up;', '0, "linear warm-up;'),
            ("min_lr: float = option(1e-6,", "min_lr: float = option(0.0,"),
            ('0.0, "0 = off (review', '0.1, "0 = off (review'),
            ("        256,\n", "        128,\n"),
            ('64, "pieces a text', '32, "pieces a text'),
            ('option("zh", "of the', 'option("en", "of the'),
            ('option(False, "vary', 'option(True, "vary'),
            ('"skip"] = option("error"', '"skip"] = option("skip"'),
            ("2] = option(2,", "2] = option(1,"),
            ('4, "first decoder blocks', '0, "first decoder blocks'),
            ('option(True, "train the', 'option(False, "train the'),
            ('True, "cut pretrained', 'False, "cut pretrained'),
            ('option(True, "go on', 'option(False, "go on'),
            ("batch_size: int = 16", "batch_size: int = 8"),
            ("learning_rate: float = 1e-3", "learning_rate: float = 2e-4"),
            ("ctc_weight: float = 0.5", "ctc_weight: float = 0.0"),
            ("augment: bool = True", "augment: bool = False"),
            ("max_steps: int = 600", "max_steps: int = 0"),
            ("max_steps: int = 500", "max_steps: int = 0"),
            ("muon: bool = True", "muon: bool = False"),
            ("warmup_epochs: float = 0.5", "warmup_epochs: float = 5"),
            ('option(False, "Muon in place', 'option(True, "Muon in place'),
            ("num_beams: int = option(1,", "num_beams: int = option(4,"),
            ('64, "longest output', '32, "longest output'),
        ],
        CONFIG + "bad_value": [
            ("least <= value <= most", "least - 1 < value <= most"),
            ("least <= value <= most", "least <= value"),
            ("kind = type(value)", "kind = int if value is True else type(value)"),
            ("most=0.99", "most=1.0"),
            ("self.min_lr > self.learning_rate", "False"),
        ],
    },
    "datasets_lite.py": {
        BITES + "own_wrist": [
            ("LEFT_WRIST = BODY.index(9)", "LEFT_WRIST = BODY.index(10)"),
            ("RIGHT_WRIST = BODY.index(10)", "RIGHT_WRIST = BODY.index(9)"),
        ],
        BITES + "arms": [
            ("points[:, 7:9] =", "points[:, [8, 7]] ="),
            ("points[:, 9:11] =", "points[:, [10, 9]] ="),
            ("(DEMO_HEAD[5:] +", "(DEMO_HEAD[:4:-1] +"),
        ],
        DATASETS + "threshold": [
            ("THRESHOLD = 0.3", "THRESHOLD = 0.4"),
            ("(scores > thr)", "(scores >= thr)"),
        ],
        BITES + "box": [
            ("(high - low).max()", "(high - low).min()"),
            ("- scale / 2  # halved", "- (high - low) / 2  # halved"),
            ("(motion[..., :2] - motion[:, :1, :2]) / scale", "motion[..., :2] / scale"),
        ],
        DATASETS + "four_usable": [("len(valid_coords) < 4", "len(valid_coords) < 3")],
        BITES + "without_a_body": [("scale > 0  # or", "scale >= 0  # or")],
        DATASETS + "nobody_wants": [("reversed(readers.values())", "readers.values()")],
        DATASETS + "half_precision": [
            ("np.float32(np.dstack([skeletons, confs]))", "np.dstack([skeletons, confs])")
        ],
        DATASETS + "first_joint": [
            ("usable &= usable[:, :1]", "usable &= usable[:, 1:2]"),
            ("usable &= usable[:, :1]", "usable &= True"),
        ],
        BITES + "each_for_themselves": [
            ("[self.config.seed, self.epoch, index]", "[self.config.seed, self.epoch]"),
            ("[self.config.seed, self.epoch, index]", "[self.config.seed, index]"),
            ("[self.config.seed, self.epoch, index]", "[self.epoch, index]"),
        ],
        BITES + "speeds": [
            ("([self.config.seed, epoch])", "([self.config.seed])"),
            ("([self.config.seed, epoch])", "([epoch])"),
            ("uniform(-1, 1, len(self))", "uniform(-1, 1, 1)"),
            ("uniform(-1, 1, len(self))", "uniform(-0.5, 1, len(self))"),
            ('self.phase == "train" and self.config.augment:', "not self.config.augment:"),
            ("1.1 ** rng.uniform(-1, 1,", "rng.uniform(0.8, 1.1,"),
        ],
        BITES + "tilts": [
            ("rng.uniform(-10, 10)", "rng.uniform(-5, 5)"),
            ("rng.uniform(0.9, 1.1)", "rng.uniform(0.8, 1.2)"),
            ("0.003 * np.float32(extent)", "0.01 * np.float32(extent)"),
            ("0.003 * np.float32(extent)", "0.003"),
            ("turn[0] *=", "turn *="),
            ("-unit.imag], [unit.imag", "unit.imag], [unit.imag"),
            ("keypoints[:, USED] +=", "keypoints[:, : len(USED)] +="),
        ],
        BITES + "another_size": [
            ("np.exp(size)", "np.exp(-size / 2)"),
            ("rng.uniform(-0.3, 0.3, 3)", "rng.uniform(-0.3, 0.3, 1).repeat(3)"),
            (" * (body[..., 2:] > 0)", ""),
            ("place.clip(-1, 1) *", "place *"),
        ],
        BITES + "moved_in": [
            ("augmented = rng is not None and config.augment", "augmented = config.augment"),
            ("augmented = rng is not None and config.augment", "augmented = rng is not None"),
            ('            move_body(pose["body"], rng)\n', "            pass\n"),
            ('move_body(pose["body"], rng)', "[move_body(part, rng) for part in pose.values()]"),
        ],
        BITES + "middle": [
            ("inside = 0.5 if", "inside = 0.0 if"),
            ("else rng.uniform(0, 0.999, max_length)", "else rng.uniform(0, 0.999)"),
            ("* (frames / max_length)", "* (frames // max_length)"),
        ],
        DATASETS + "evaluation_never or varies_training": [
            ('if self.phase == "train":\n            # from', "if True:\n            # from"),
        ],
        DATASETS + "joined or epochs_lengths or do_not_fit": [
            ("frames <= self.config.max_length and", ""),
            ('bool(first["gloss"]) == bool(second["gloss"])', "True"),
            ("return index != other and short", "return short"),
            (" and characters <= self.config.max_text_length", ""),
            ("rng.random() < self.config.join", "rng.random() > self.config.join"),
            ("if epoch >= 2 and self", "if self"),
            ('between = "" if', 'between = " " if'),
            ("self._load_pose(clip) for clip", "self._load_pose(index) for clip"),
            ("sum(glosses, [])", "glosses[0]"),
            ("between.join(texts)", "texts[0]"),
            ("+= self.lengths[other]", "+= 0"),
            ("rng.permutation(len(self)).tolist()):", "range(len(self))):"),
        ],
        DATASETS + "left_out_and_listed": [
            ('if "report" in entry]', 'if "report" in entry] * 2'),
        ],
        BITES + "one_size_and_time": [
            ("{path} {stat.st_size} {stat.st_mtime_ns}", "{stat.st_size} {stat.st_mtime_ns}"),
        ],
        BITES + "listed_anew": [
            ('mode = "w" if', 'mode = "a" if'),
            ('else "a"  # train comes', 'else "w"  # train comes'),
        ],
        DATASETS + "read_once": [
            ("{path} {stat.st_size} {stat.st_mtime_ns}", "{path} {stat.st_size}"),
            ("if folder and todo:", "if False:"),
        ],
        DATASETS + "outside_of_pose_format or leads_out": [
            ('is_absolute() or ".." in Path(name).parts', "is_absolute()"),
            ('Path(name).is_absolute() or ".."', '".."'),
            (" and not leads_out(name)", ""),
        ],
        BITES + "clip_is_counted": [
            ("seen = seen_joints(keypoints, scores)  # (T, 133)", "seen = scores > THRESHOLD"),
            ("[LEFT[0], RIGHT[0]]].any(1)", "[LEFT[0], RIGHT[0]]].all(1)"),
            ("not_finite[:, USED].sum()", "not_finite.sum()"),
            ("np.isfinite(x + y + scores)", "np.isfinite(x + y)"),
            ("keypoints[seen_joints(keypoints, scores)] > 2", "keypoints > 2000"),
        ],
        BITES + "size_limit": [
            ("if size > MAX_BYTES:", "if size > MAX_BYTES + 1:"),
            ("if size > MAX_BYTES:", "if size >= MAX_BYTES:"),
        ],
        BITES + "unpacks_to": [
            ("check_size(path, len(pickle.dumps(result)))", "check_size(path, 0)")
        ],
        BITES + "every_core": [
            ("list(todo.values()), os.cpu_count())", "list(todo.values()), 1)"),
            ("turn = number % children", "turn = 0"),
        ],
        DATASETS + "start_and_end or bad_pose_file": [
            ("keypoints[start:end, :, :2]", "keypoints[start:, :, :2]"),
            ("scores[start:end, :, 0]", "scores[:end, :, 0]"),
            ("min(start or 0, end or 0) < 0", "False"),
        ],
        DATASETS + "pixels": [
            ("is not None and in_pixels(", "is not None or in_pixels("),
            ("keypoints / size", "keypoints / size[::-1]"),
        ],
        FUZZ + "damaged_npz": [('if path.suffix == ".npz":', "if False:")],
        DATASETS + "silent_loss": [("if key in entries:", "if False:")],
        DATASETS + "padded_with_zeros": [
            ("torch.tensor([len(pose", "1 + torch.tensor([len(pose"),
        ],
    },
    "models_lite.py": {
        BITES + "given_as_a_text": [("[gloss] if isinstance(gloss, str) else gloss", "gloss")],
        BITES + "own_wrist": [
            ("body[:, :, LEFT_WRIST] * flip", "body[:, :, RIGHT_WRIST] * flip"),
            ("body[:, :, RIGHT_WRIST])", "body[:, :, LEFT_WRIST])"),
            ("body[:, :, LEFT_WRIST] * flip", "body[:, :, LEFT_WRIST]"),
            ('src_input["left"] * flip', 'src_input["left"]'),
            ("body[:, :, RIGHT_WRIST])", "body[:, :, RIGHT_WRIST] * flip)"),
            ("[-1.0, 1.0, 1.0]", "[1.0, -1.0, 1.0]"),
        ],
        BITES + "root_mean_square": [
            ("(confidence > 0).sum(", "(confidence >= 0).sum("),
            ("* joints.sqrt()", "* joints"),
        ],
        BITES + "docstring_draws": [
            ("*hands.chunk(2)]", "*reversed(hands.chunk(2))]"),
            ("self.fusion(F.gelu(parts))", "self.fusion(parts)"),
            ("return x + self.dropout(", "return self.dropout("),
            ("self.linear(F.gelu(h))", "self.linear(h)"),
            ("h = self.norm(x) * mask", "h = x * mask"),
            ("(0, 0, 0, -T % stride)", "(0, 0, -T % stride, 0)"),
        ],
        BITES + "reaches_four": [("kernel_size=5, padding=2", "kernel_size=3, padding=1")],
        MODELS + "padding_does_not_change or depend_on_its_batch": [
            ("h = self.norm(x) * mask", "h = self.norm(x)"),
            ("F.pad(x * mask[..., None],", "F.pad(x,"),
        ],
        MODELS + "centred or taken_over": [
            ("2 * (x - self.mean)", "x - self.mean"),
            ("mean = body[real].mean(0)", "mean = body.flatten(0, 1).mean(0)"),
            ("hands[real.repeat(2, 1)]", "hands[: len(real)][real]"),
            ('return state | self.pose_embed.state_dict(prefix="pose_embed.")', "return state"),
        ],
        MODELS + "velocity": [
            ("seen[:, 1:] & seen[:, :-1]", "seen[:, 1:] | seen[:, :-1]"),
            ("velocity[:, 1:] = xy", "velocity[:, :-1] = xy"),
        ],
        MODELS + "bone": [
            ("seen[:, :, 1:] & seen[:, :, :-1]", "seen[:, :, 1:] | seen[:, :, :-1]"),
            (".diff(dim=2) * both_seen", ".diff(dim=2)"),
            ("part_features(hand), bones(hand)", "part_features(hand), 0 * bones(hand)"),
        ],
        BITES + "glorots": [
            ("nn.init.xavier_uniform_(layer.weight)", "pass"),
            ("nn.init.zeros_(layer.bias)", "pass"),
        ],
        BITES + "sizes": [
            ("d_ff=2 * config.d_model", "d_ff=4 * config.d_model"),
            (
                "num_layers=config.num_layers,",
                "num_layers=config.num_layers, num_decoder_layers=2,",
            ),
        ],
        BITES + "best_path": [
            ("torch.unique_consecutive(best[real])", "best[real]"),
            ("unique_consecutive(best[real])", "unique_consecutive(best)"),
            ("for i in path if i != BLANK", "for i in path"),
        ],
        MODELS + "ctc": [
            ("classes.get(word, UNKNOWN_GLOSS)", "classes.get(word, BLANK + 2)"),
            ("loss + self.config.ctc_weight * ctc", "loss + ctc"),
            ("losses[target_lengths > 0].sum()", "losses[target_lengths > 0].mean()"),
            ("losses[target_lengths > 0].sum()", "losses.sum()"),
            ("zero_infinity=True", "zero_infinity=False"),
        ],
        BITES + "as_many_other_glosses": [("if other.glosses != self.glosses:", "if False:")],
        MODELS + "shared_pieces": [
            ("given[rows[known]]", "given[: int(known.sum())]"),
            ("row.get(piece, -1)", "row.get(piece, 0)"),
        ],
        BITES + "decoding_option": [
            ('min(options["max_new_tokens"], self', "min(64, self"),
            ("asdict(InferenceConfig(**decoding))", "asdict(InferenceConfig())"),
            ("**options,", '**options | {"length_penalty": 1.0},'),
            ("do_sample=False", "do_sample=True"),
        ],
        MODELS + "grows_far": [("self.longest_text * 5 // 4 + 1", "self.longest_text * 2")],
        MODELS + "shifted_twice": [
            ("labels=labels)\n", "labels=labels, decoder_input_ids=labels.clamp(min=0))\n"),
            ("label_smoothing=smoothing)", "label_smoothing=smoothing / 2)"),
            ("(logits.argmax(1) == labels)", "(logits.argmax(1) != labels)"),
        ],
        MODELS + "depend_on_its_batch or halves": [
            ("loss=loss,", "loss=loss * tokens / len(labels),"),
            ("tokens = int((labels != IGNORE).sum())", "tokens = labels.numel()"),
        ],
        MODELS + "repeated_piece or one_by_one": [
            ("self.piece_position(pieces, begin)", "self.piece_position(pieces)"),
            ("self.piece_position(pieces, begin)", "pieces"),
        ],
        MODELS + "requires_grad or nothing_is_frozen": [
            ("blocks[:depth].requires_grad_(False)", "blocks[depth:].requires_grad_(False)"),
            ("shared.requires_grad_(self.config.train_embedding)", "requires_grad_(True)"),
            ("if self.config.mt5_path:  # from scratch", "if True:  # from scratch"),
        ],
        MODELS + "depth_beyond": [("if depth > len(blocks):", "if False:")],
        MODELS + "start_smaller": [
            ("self.layer_norm.weight, 0.5)", "self.layer_norm.weight, 1.0)")
        ],
        MODELS + "sinusoid": [("10000 ** (", "1000 ** (")],
        MODELS + "apart_from_the_table": [
            ("nn.Parameter(mt5.shared.weight.detach().clone())", "mt5.shared.weight"),
        ],
        MODELS + "near_the_uniform": [("std=config.d_model**-0.5", "std=1.0")],
        MODELS + "cut_at_max_text_length": [
            ("[*rows[: self.max_text_length - 1], end]", "[*rows, end][: self.max_text_length]")
        ],
        BITES + "single_characters": [
            ('if "<extra_id_" not in piece and (', "if ("),
            ('"(?s)▁?.?|<0x..>"', '"(?s).?|<0x..>"'),
            ('"(?s)▁?.?|<0x..>"', '"(?s).*"'),
            ('"(?s)▁?.?|<0x..>"', '"(?s)▁?.?"'),
        ],
        MODELS + "is_spelled": [
            ('"(?s)▁?.?|<0x..>"', '"(?s)<0x..>"'),
            (
                "rows += [self.row.get(part, self.unknown) for part in spelled]",
                "rows += spelled[:0]",
            ),
        ],
        BITES + "longer_piece": [
            ("len, texts)) // 400)", "len, texts)) // 40)"),
            ("longer = min(vocab_size, ", "longer = max(0, "),
        ],
        MODELS + "in_shards": [("weights |= load_file(path)", "weights = load_file(path)")],
        BITES + "best_old": [
            ('path / "best.old", path, Path', "path, Path"),
            ('Path(f"{path}.old")):', "path):"),
            (
                '(path / "best", path / "best.old", path,',
                '(path / "best.old", path / "best", path,',
            ),
            (' and (folder / "model.safetensors").is_file()', ""),
        ],
    },
    "train_lite.py": {
        BITES + "number_their_batches": [
            ("number = rank\n", "number = 0\n"),
            ("counts = rank < len(turn)", "counts = True"),
            ("turn[rank if counts else -1]", "turn[-1]"),
            ("number += len(turn)", "number += 1"),
        ],
        DATASETS + "window_is_divided": [
            ("config.gradient_accumulation * world", "config.gradient_accumulation"),
        ],
        DATASETS + "order_follows or waste": [
            ("([config.seed, data.epoch])\n    size", "([config.seed])\n    size"),
            ("key=lambda clip: -lengths[clip]", "key=lambda clip: 0"),
        ],
        DATASETS + "joined_clips_and_single": [
            ("by_length(window, data.totals)", "by_length(window, data.lengths)"),
        ],
        TRAIN + "evaluation_begins": [
            ("key=lambda clip: -lengths[clip]", "key=lambda clip: lengths[clip]"),
        ],
        BITES + "mean_over_its_tokens": [
            ("run.place.world / tokens)", "1 / run.config.gradient_accumulation)"),
            ("run.place.world / tokens)", "1 / window['clips'])"),
            ("summed_loss = output.loss * tokens", "summed_loss = output.loss"),
            ("run.config.max_grad_norm or math.inf\n", "math.inf\n"),
            ("run.config.max_grad_norm or math.inf\n", "run.config.max_grad_norm\n"),
        ],
        BITES + "tokens_of_both": [
            ("run.place.world / tokens)", "1 / tokens)"),
            ("run.signals.number)):", "run.signals.number))[:1]:"),
            ("max(stop_signal, signal_number)", "run.signals.number"),
            ("    if stop_signal:\n        raise Stopped", "    if False:\n        raise Stopped"),
            ("run.window = Counter()  # what", "pass  # what"),
        ],
        BITES + "repeated_batch": [
            ("summed_loss = summed_loss * 0.0", "pass"),
            ("    if not counts:\n        return\n", ""),
        ],
        BITES + "dropout_follows": [
            ("(run.config.seed, run.epoch, number)", "(run.config.seed, run.epoch)"),
            ("(run.config.seed, run.epoch, number)", "(run.config.seed, number)"),
            ("(run.config.seed, run.epoch, number)", "(run.epoch, number)"),
        ],
        BITES + "from_the_seed": [("torch.manual_seed(config.seed)", "torch.manual_seed(0)")],
        BITES + "alone_that_is_not or ten_bad": [
            ("math.isfinite(norm) and ", ""),
            (' and math.isfinite(window["loss"])', ""),
            ("        run.bad_in_a_row = 0\n", ""),
            ("run.bad_in_a_row >= 10:", "run.bad_in_a_row >= 11:"),
            ("run.bad_in_a_row >= 10:", "run.skipped >= 10:"),
            ("zero_grad()  # a step", "zero_grad(set_to_none=False)  # a step"),
            ("            scheduler.step()\n", "            pass\n"),
        ],
        TRAIN + "flipped_bit": [
            ("content[-4:].tobytes() != checksum(content[:-4])", "False"),
        ],
        TRAIN + "whose_loss_was_not_finite": [
            ("if not math.isfinite(loss):", "if True:"),
        ],
        TRAIN + "resume or stopped or killed": [("rest = plan[run.batch :]", "rest = plan")],
        TRAIN + "short_window": [("window_full or run.batch == len(plan)", "window_full")],
        BITES + "stands_where": [
            ('KEPT = "epoch batch step skipped bad', 'KEPT = "epoch batch step bad'),
            ("skipped bad_in_a_row meter history", "skipped meter history"),
            ("bad_in_a_row meter history", "bad_in_a_row history"),
            ("meter history average", "meter history"),
            ('last = min(state["step"], total_steps - 1) - 1', "last = -1"),
            ("optimizer.load_state_dict(saved)", "pass"),
            ('if not list(run.folder.glob("best*")):', "if False:"),
        ],
        BITES + "average": [
            ("run.step / 8))", "run.step))"),
            ("max(1, min(run.config.average_steps, run", "max(1, min(99, run"),
            ("1 / steps)", "1)"),
            ("model = averaged_model(run)", "model = run.model"),
            ("        model.save_pretrained(folder", "        run.model.save_pretrained(folder"),
            ("model = deepcopy(run.model)", "model = run.model"),
        ],
        BITES + "last_weights": [
            ("run.step >= run.total_steps and run.validated", "run.step >= run.total_steps"),
            ('entry["step"] == self.step', "True"),
        ],
        TRAIN + "decides_how_bleu": [
            ('"zh" if language == "zh" else "char"', '"char" if language == "zh" else "char"'),
        ],
        BITES + "plainly_worse or validation_saves": [
            ('else "exact_match"', 'else "chrf"'),
            ("max(scores[(len(scores) - 1) // 2 :])", "max(scores)"),
            ("max(recent - error,", "max(recent,"),
            ("max(recent - error,", "max(recent - 2 * error,"),
            ("highest - 3 * error)", "0)"),
            ("highest - 3 * error)", "highest - error)"),
            ("in (highest, recent))", "in (recent,))"),
            ("if run.best is metrics:", "if True:"),
            ("signals = run.signals if run.place.world == 1 else None", "signals = None"),
            ("signals = run.signals if run.place.world == 1 else None", "signals = run.signals"),
            ("    run.meter = Counter()\n    print_validation", "    print_validation"),
            ('"skipped_steps": run.skipped', '"skipped_steps": 0'),
        ],
        BITES + "ends_an_evaluation": [("if signals and signals.number:", "if False:")],
        BITES + "signals_to_the_main": [
            ("worker_init_fn=leave_signals_to_main", "worker_init_fn=print"),
            ("signal.SIG_IGN)", "signal.SIG_DFL)"),
            ('getattr(signal, "SIGUSR1"', 'getattr(signal, "SIGUSR9"'),
        ],
        BITES + "when_they_are_due": [
            ("run.step % run.config.log_interval == 0", "run.step"),
            ('"loss": run.last_loss', '"loss": run.meter["loss"] / tokens'),
            ('run.meter["nll"] / tokens,', 'run.meter["nll"],'),
            ("run.saved_at > SAVE_EVERY", "run.saved_at > 10 * 365 * 86400"),
        ],
        BITES + "on_disk_before or flushing": [
            ("for written in [*aside.rglob", "for written in [*path.rglob"),
            ('[*aside.rglob("*"), aside]', "[aside]"),
            ("        flush_to_disk(path.parent)\n", ""),
            ("os.replace(path, old)", "shutil.rmtree(path)"),
            ("os.fsync(handle)", "pass"),
            ("        os.close(handle)\n", ""),
        ],
        BITES + "best_old": [
            (
                'find_latest_checkpoint(folder) or list(folder.glob("best*"))',
                "find_latest_checkpoint(folder)",
            )
        ],
        BITES + "dead_process": [('folder.glob("*.part")', 'folder.glob("*.tmp")')],
        BITES + "goes_on": [
            ('"labels": self.labels,', ""),
            (', "processes": self.place.world', ""),
            ('FREE_FIELDS = """output_dir ', 'FREE_FIELDS = """output_dir weight_decay '),
            ('FREE_FIELDS = """output_dir ', 'FREE_FIELDS = """output_dir seed '),
            ('FREE_FIELDS = """output_dir ', 'FREE_FIELDS = """output_dir max_grad_norm '),
            ("num_workers device log_interval", "num_workers log_interval"),
            ("if not 0 < saved.get(budget, 0) <=", "if not saved.get(budget, 0) <="),
            ("if not 0 < saved.get(budget, 0) <= now[budget]", "if not 0 < saved.get(budget, 0)"),
            ("saved.get(budget, 0) <= now[budget]", "saved.get(budget, 0) == now[budget]"),
        ],
        BITES + "resume_from": [
            ('differences(load_checkpoint(resumed)["config"], description)', '""'),
            ("if not config.output_dir or base.resolve()", "if base.resolve()"),
        ],
        BITES + "labels_digest": [
            ('in ("dev", "train"):\n        path', 'in ("train",):\n        path'),
            ("zlib.crc32(path.read_bytes(), digest)", "zlib.crc32(path.read_bytes())"),
            (
                "digest = zlib.crc32(path.read_bytes(), digest)",
                "digest ^= zlib.crc32(path.read_bytes())",
            ),
        ],
        BITES + "warm_up": [
            ("total_steps // 10 if", "total_steps // 2 if"),
            ("else total_steps // 2", "else total_steps"),
            ("min(round(config.warmup_epochs * steps_per_epoch), longest)", "longest"),
        ],
        TRAIN + "warms_up_from": [("min_lr=config.min_lr", "min_lr=0.0")],
        TRAIN + "do_not_decay": [
            ('"weight_decay": config.weight_decay', '"weight_decay": 0.0'),
            ("p.ndim <= 1", "p.ndim == 0"),
        ],
        BITES + "not_there": [("device_count() <= local_rank", "device_count() < local_rank")],
        BITES + "sizes_that_are_not or field_of_the_wrong or lead_astray or sent_run": [
            ("            make_config(InferenceConfig, values)\n", ""),
        ],
        BITES + "another_machine": [
            ('values.pop("num_workers", None)', "pass"),
            ('values["device"] = "auto"', "pass"),
        ],
        BITES + "lock_that_is": [('folder / ".lock", "a")', 'folder / ".lock", "w")')],
        BITES + "percent": [('.replace("%", "%%")', "")],
        BITES + "speak_over": [('if device.type == "cuda" else "gloo"', "")],
        BITES + "passed_by": [
            (
                "saved = json.loads(described.read_bytes())",
                'saved = load_checkpoint(last)["config"]',
            )
        ],
        BITES + "working_folder": [("{Path(os.path.abspath(base)).name}-", "{base.name}-")],
        BITES + "rate_ends": [("if run.step + 1 < run.total_steps:", "if True:")],
        BITES + "centred_by": [
            ("model.centre(src_input)", "pass"),
        ],
        BITES + "muon": [
            ('"proj", "mt5_model.encoder.block")', '"proj")'),
            ('"mt5_model.encoder.block")', '"mt5_model.encoder.block", "mt5_model.decoder.block")'),
            ("if config.muon and isinstance(", "if isinstance("),
            ("if config.muon and isinstance(", "if False and isinstance("),
            ("optimizers.append(muon)", "pass"),
            ("4 * config.learning_rate", "config.learning_rate"),
        ],
        BITES + "exit_codes": [
            ("return 128 + signal.SIGINT", "return 1"),
            ("(ConfigError, DataError, RunError, OSError)", "Exception"),
        ],
        BITES + "distance or rouge": [
            ("(0 if a == b else replace)", "(0 if a == b else 1)"),
            ("row[j] + 1))", "row[j]))"),
            ("replace=2)", "replace=1)"),
            ("1.44 * len(reference)", "len(reference)"),
            ("split = list if", "split = str.split if"),
        ],
        BITES + "punctuation or texts_by_hand": [
            ('tokenize = "13a"', 'tokenize = "none"'),
            ("100 * len(set(predictions)) / count", "100 * len(set(references)) / count"),
            ("100 * sum(p == r for", "100 * sum(p != r for"),
        ],
        BITES + "normalised": [
            ("[normalise(text).replace", "[text.replace"),
            ('between = "" if', 'between = " " if'),
        ],
        BITES + "exchange": [
            ("shift = max(*Counter(texts).values(), len(texts) // 2)", "shift = len(texts) // 3"),
            ("shift = max(*Counter(texts).values(), len(texts) // 2)", "shift = 1"),
            (
                "shift = max(*Counter(texts).values(), len(texts) // 2)",
                "shift = len(texts) // 2",
                "n - shift: the same",
            ),
            ("np.roll(ranked, -shift)", "ranked"),
            ("for i in exchange(references)", "for i in range(len(references))"),
        ],
        BITES + "collapse": [
            ("max(1, 0.2", "max(3, 0.2"),
            ("max(1, 0.2 * min(", "max(1, 0.0 * min("),
            ("min(shuffled, 100 - shuffled)", "shuffled"),
            ("gap >= least_gap and variety >= 0.2", "gap >= least_gap"),
            ('metrics["exact_match"] >= 50', 'metrics["exact_match"] > 50'),
            ("len(predictions) < 2 or", "len(predictions) < 1 or"),
        ],
        BITES + "exact_match_first": [
            ('if not metrics["bleu4"]:', "if False:"),
            ("(with_interval | metrics | with_interval)", "(metrics | with_interval)"),
        ],
        BITES + "shortened": [("text[:57]", "text[:60]")],
        BITES + "evaluation_by_hand": [
            ("edit_distance(found, wanted)\n", "abs(len(found) - len(wanted))\n"),
            ("            if wanted:\n", "            if True:\n"),
            ("glosses += len(wanted)", "glosses += len(found)"),
            ("nll += output.nll.item() * output.num_tokens", "nll += output.nll.item()"),
            ("    rows.sort()  #", "    #"),
            (
                "texts = model.generate(src_input, **asdict(inference))",
                "texts = model.generate(src_input)",
            ),
        ],
        BITES + "as_the_run_did": [
            (
                "text = model.generate(src_input, **asdict(inference))[0]",
                "text = model.generate(src_input)[0]",
            ),
            ("make_config(InferenceConfig, values), args", "InferenceConfig(), args"),
            ("    values |= given\n", "    values = given | values\n"),
        ],
        BITES + "no_longer_clips": [
            ('    config.output_dir = ""  # eval', "    pass  # eval"),
        ],
        BITES + "validation_saves": [
            ('"name\\treference\\tprediction\\n"', '"name\\tprediction\\treference\\n"'),
            ('re.sub(r"\\s+", " ", cell)', "cell"),
            ("for cell in row[1:])", "for cell in row)"),
        ],
        BITES + "figures_of_check or long_clips": [
            ("[5, 50, 95]", "[0, 50, 100]"),
            ("(frames > limit).mean()", "(frames >= limit).mean()"),
            ("if over > 5:", "if over > 60:"),
            ("if over > 5:", "if over >= 5:"),
            ("np.percentile(frames, 97)", "np.percentile(frames, 50)"),
            ("if no_hand > 50 or", "if no_hand > 90 or"),
            ("length > limit for", "length >= limit for"),
            ("    if cut:\n", "    if False:\n"),
            ("    if unspellable:\n", "    if False:\n"),
            ("if codec.unknown in rows]", "if rows]"),
            ("figures[5:].sum(1)", "figures[5:].max(1)"),
            ("setdefault(text, split) != split", "setdefault(text, split) == split"),
        ],
        BITES + "gets_wrong": [
            ("if window < 32:", "if window < 31:"),
            ("if config.ctc_weight and run.model.gloss_head is None:", "if False:"),
            ('if config.language == "zh" and', "if"),
            ("max(dev_texts) <", "min(dev_texts) <"),
        ],
        TRAIN + "epochs_gets_epochs": [('values["max_steps"] = 0', "pass")],
    },
}


# ---------------------------------------------------------------------- the program


def main(words):
    mutants = list(every_mutant(words))
    wrong = [f"{file} has {count} x {text!r}" for file, text, *_, count in mutants if count != 1]
    if wrong or not mutants:
        sys.exit("\n".join(wrong) or "no fault has such words")
    load_libraries()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "repository")
        useless = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "checkpoints", "data")
        shutil.copytree(ROOT, copy, ignore=useless)
        for tests in dict.fromkeys(tests for _, _, _, tests, *_ in mutants):
            if code := run_tests(copy, tests):
                sys.exit(f"without a fault pytest {tests!r} ends with {code}: nothing is planted")
        for number, (file, text, instead, tests, reason, _) in enumerate(mutants, 1):
            path = copy / file
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(text, instead), encoding="utf-8")
            os.utime(path, (number, number))  # so that no other fault's bytecode is taken for its
            verdicts = {0: "SURVIVED", 2: "BROKEN", 4: "BROKEN"}  # the last two: cannot be imported
            verdict = verdicts.get(run_tests(copy, tests), "killed")
            path.write_text(whole, encoding="utf-8")
            survived += verdict != "killed" and not reason
            why = reason if verdict != "killed" else ""
            print(f"{number:3} {verdict:8} {file}: {text!r} -> {instead!r} {why}", flush=True)
    print(f"{len(mutants)} faults, {survived} of them survived without a reason")
    return int(survived > 0)


def every_mutant(words):
    """(file, text, instead, tests, reason or "", how often the text stands in the file)."""
    for file, by_tests in TABLE.items():
        content = (ROOT / file).read_text(encoding="utf-8")
        for tests, faults in by_tests.items():
            for text, instead, *reason in faults:
                mutant = (file, text, instead, tests, "".join(reason), content.count(text))
                if not words or any(word in "\n".join(mutant[:4]) for word in words):
                    yield mutant


def load_libraries():
    """Once, for all that are forked; of the project, none."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import pytest  # noqa: F401
    import sacrebleu  # noqa: F401
    import torch.utils.data
    from transformers import MT5ForConditionalGeneration, T5Tokenizer  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork


def run_tests(copy, tests):
    """-> pytest's exit code: 0 = they pass, 1 = one fails; below 0 a signal, as the alarm's."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setpgrp()
        signal.alarm(SECONDS)
        os.chdir(copy)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        import pytest

        file, _, words = tests.partition(" -k ")
        flags = ["-x", "-q", "--assert=plain", f"--basetemp={copy.parent / 'tests'}"]
        flags += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]  # seconds, for nothing
        os._exit(pytest.main([file, "-k", words, *flags]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started, and left
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
