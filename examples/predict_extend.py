"""Predict-extend from first principles: train with GRPO, predict where the weights are going, jump there, continue.

A step of reinforcement learning is expensive: it samples many completions. But the weights of such a run keep their
direction for tens of steps, so a few checkpoints show where they are going. This file is the whole method, with the
settings of quickstart.yaml. `python examples/predict_extend.py` takes half a minute on one CPU core.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

# All times are steps of RL; a jump takes none.
STEPS, EVERY = 100, 5  # length of the run, and steps between checkpoints
OBSERVE, JUMP_EVERY = 50, 10  # steps before the first jump, and between jumps
SETTLE = 10  # last steps, without a jump: a jump pays off over the steps that follow it
HORIZON, ALPHA = 10, 4.0  # a jump repeats the motion of the last 10 steps, up to 4 times as long
GATE = 25  # steps of each of the two successive motions whose agreement decides how long
MAX_RATIO = 10.0  # longest jump, as a multiple of the motion over the last HORIZON steps
MAX_DROP = 0.2  # a jump that costs more accuracy than this is undone

# LoRA adds SCALING * B A to a frozen m x n matrix W, and trains the thin factors A (r, n) and B (m, r).
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
SCALING = LORA.lora_alpha / LORA.r
TASK = Path(__file__).parent / "arithmetic"


# 1. Deltas. A checkpoint is a list of (A, B), one pair for each matrix. From one to a later one, a matrix moves by
# D = SCALING (B1 A1 - B0 A0). That is m x n numbers but rank 2r at most, so we keep two thin factors and never form D.
# [B1 - B0, B0] [A1; A1 - A0] subtracts before it multiplies: the difference of products loses digits to cancellation.
def deltas(later, earlier):
    """How each matrix moved: left (m, 2r) and right (2r, n) in float64, whose product it is."""
    pairs = zip(each(torch.Tensor.double, later), each(torch.Tensor.double, earlier), strict=True)
    return [(SCALING * torch.cat([B1 - B0, B0], 1), torch.cat([A1, A1 - A0])) for (A1, B1), (A0, B0) in pairs]


def each(function, *checkpoints):
    """Apply a function to every A and every B of some checkpoints."""
    return [tuple(map(function, *pairs)) for pairs in zip(*checkpoints, strict=True)]


def inner(D, E):
    """<D, E> = trace(D^T E) of two deltas, from products of size 2r x 2r alone."""
    return ((D[0].T @ E[0]) * (D[1] @ E[1].T)).sum()


def triplet(D):
    """The leading singular triplet u (m,), sigma, v (n,) of a delta: sigma u v^T is its best rank-1 approximation."""
    # left = Q_l R_l and right^T = Q_r R_r with orthonormal Q: the small R_l R_r^T has the singular values of the delta.
    (Q_l, R_l), (Q_r, R_r) = torch.linalg.qr(D[0]), torch.linalg.qr(D[1].T)
    U, S, Vt = torch.linalg.svd(R_l @ R_r.T)
    return Q_l @ U[:, 0], S[0], Q_r @ Vt[0]


# 2. Predict. In this run the leading triplets hold 60 to 80% of the energy of a motion. NExt (arXiv 2604.11446) and
# AlphaRL (2510.00553) predict only them, and add sigma u v^T to W. We continue all of the motion, on the straight line
# through two checkpoints of A and B: the rank stays r, and Adam's moments, which belong to A and B, stay valid.
# How far to trust the line shows in the recent past. Let P and D be two successive motions of a matrix. The multiple of
# P that comes closest to D is <P, D> / <P, P>: 1 if the matrix went straight on, 0 if it turned by a right angle. Up to
# 0.2 a matrix stays put, from 0.6 on it jumps in full; likewise all of them with the median, from 0.25 to 0.5.
def predict(past, step):
    """Where A and B will be, as a checkpoint in float64, and the median agreement."""
    now, recent, middle, start = (past[step - back] for back in (0, HORIZON, GATE, 2 * GATE))
    successive = zip(deltas(middle, start), deltas(now, middle), strict=True)
    agreement = torch.stack([inner(P, D) / inner(P, P) for P, D in successive])
    median = agreement.quantile(0.5)
    lengths = ALPHA * ((agreement - 0.2) / 0.4).clamp(0, 1) * ((median - 0.25) / 0.25).clamp(0, 1)
    moved = each(lambda new, old: new.double() - old.double(), now, recent)
    lines = zip(now, moved, lengths, strict=True)
    return [(A + length * dA, B + length * dB) for (A, B), (dA, dB), length in lines], median


# 3. Check, jump, continue. The trainer calls this after every step, and goes on from the weights that it leaves.
class PredictExtend(TrainerCallback):
    def __init__(self, trainer):
        layers = [layer for layer in trainer.model.modules() if hasattr(layer, "lora_A")]
        self.live = [(layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data) for layer in layers]
        self.trainer, self.past = trainer, {0: each(torch.clone, self.live)}

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if step % EVERY == 0:
            self.past[step] = each(torch.clone, self.live)
        if OBSERVE <= step <= STEPS - SETTLE and (step - OBSERVE) % JUMP_EVERY == 0:
            self.jump(step)

    def jump(self, step):
        now, (target, agreement) = self.past[step], predict(self.past, step)
        recent, ahead = deltas(now, self.past[step - HORIZON]), deltas(target, now)
        energy = sum(inner(D, D) for D in recent)
        share = sum(triplet(D)[1] ** 2 for D in recent) / energy
        ratio = (sum(inner(D, D) for D in ahead) / energy).sqrt()
        before = after = accuracy(self.trainer, "validation")
        verdict = "no jump"
        if 0 < ratio <= MAX_RATIO:  # neither NaN nor infinity
            each(torch.Tensor.copy_, self.live, target)
            after, verdict = accuracy(self.trainer, "validation"), "jumped"
        if not after >= before - MAX_DROP:  # NaN, too
            each(torch.Tensor.copy_, self.live, now)
            verdict = "undone"
        # Move the past along, so that the next deltas measure what RL did and not what the jump did.
        moved = each(torch.sub, self.live, now)
        self.past = {t: each(torch.add, then, moved) for t, then in self.past.items()}
        print(f"{step:4} {agreement:10.2f} {share:13.2f} {ratio:12.1f}   {before:.3f} -> {after:.3f}  {verdict}")


# 4. The run. A Qwen2 of 300,000 parameters knows arithmetic but often slips; GRPO makes it reliable.
def read(split):
    return [json.loads(line) for line in (TASK / f"{split}.jsonl").read_text().splitlines()]


def right_answer(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


@torch.no_grad()
def accuracy(trainer, split):
    """The mean probability of sampling exactly the right answer: computed, and so without sampling noise."""
    texts = [row["prompt"] + row["answer"] + trainer.processing_class.eos_token for row in read(split)]
    batch = trainer.processing_class(texts, return_tensors="pt", padding=True, padding_side="right")
    logits, ids = trainer.model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
    logps = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * batch["attention_mask"][:, 1:]
    return float(logps[:, 5:].sum(1).exp().mean())  # the first 6 tokens are the prompt


def make_trainer():
    set_seed(0)  # PEFT draws A here, and both runs have to start with the same
    grpo = {"per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 4, "beta": 0.0}
    optimizer = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_steps": STEPS, "seed": 0}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    quiet = {"output_dir": "runs/predict_extend", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args, train = GRPOConfig(**grpo, **optimizer, **plain, **quiet), Dataset.from_list(read("train"))
    trainer = GRPOTrainer(str(TASK / "base"), right_answer, args, train, peft_config=LORA)
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)  # more do not help a model this small
    for name in ("plain GRPO", "with jumps"):
        trainer = make_trainer()
        if name == "with jumps":
            trainer.add_callback(PredictExtend(trainer))
            print("step  agreement  rank-1 share  jump/motion   accuracy")
        trainer.train()
        print(f"{name}: {accuracy(trainer, 'test'):.3f} of the test answers are right after {STEPS} steps")
