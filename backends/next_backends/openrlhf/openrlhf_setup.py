"""What all OpenRLHF processes of one run share: prompts, rewards, command line, launch settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from next_backends.data import is_chat
from next_backends.external.environment import ask
from next_backends.external.trainer_setup import TrainerSetup
from next_backends.openrlhf import command
from next_core.errors import trainer_failed
from next_core.storage.atomic import write_text

VERSION = "0.11.2"  # The release of OpenRLHF that this backend drives
PROMPTS = "prompts.jsonl"
TRAINER_SIDE = Path(__file__).parent / "trainer_side"


def parse(config: Any, options: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that OpenRLHF's own parser and checks make of a command line. Raises as ``ask`` does."""
    return ask(config, "OpenRLHF", VERSION, TRAINER_SIDE / "parse.py", options)


class OpenRlhfSetup(TrainerSetup):
    """Prepares the trainers of a run, which work in ``folder``."""

    trainer_side = TRAINER_SIDE
    check_run = staticmethod(command.check_run)

    def serve_rewards(self) -> None:
        if self.config.reward_file is None:
            super().serve_rewards()

    def states(self, start: int) -> Path:
        return self.folder / f"ckpt-{start:06d}"

    def options(self, start: int, load: bool = False) -> list[str]:
        run, batch = self.run, self.run.training.prompts_per_step
        reward = self.config.reward_file or (self.rewards.url if self.rewards is not None else "http://127.0.0.1:0/")
        options = {
            "--actor.model_name_or_path": ("training.model", run.training.model),
            "--ckpt.load_enable": ("`next-core run`", load),
            # Step scaling saves first, into the state's folder: OpenRLHF counts it when it makes room for that state.
            "--ckpt.max_num": ("save_every", 4 if self.scales else 3),
            "--ckpt.output_dir": ("`next-core run --out`", self.folder / "final"),
            "--ckpt.path": ("`next-core run --out`", self.states(start)),
            "--ckpt.save_hf": ("backend.save_hf", self.config.save_hf),
            "--ckpt.save_steps": ("save_every", -1 if run.save_every is None else run.save_every),
            "--data.apply_chat_template": ("training.data", is_chat(self.rows)),
            "--data.max_samples": ("steps", len(self.rows) // batch * batch),
            "--data.prompt_dataset": ("training.data.train", self.folder / PROMPTS),
            "--reward.remote_url": ("training.reward", reward),
            "--train.num_episodes": ("steps", run.steps),  # more than enough: the run ends when its steps are done
            "--train.seed": ("seed", run.seed + start),  # a new trainer draws other samples, in another order
        }
        return command.make_command(run, self.config, options)

    def write_prompts(self, start: int) -> None:
        """Write the training prompts, those of step ``start`` first."""
        first = start * self.run.training.prompts_per_step % len(self.rows)
        rows = self.rows[first:] + self.rows[:first]
        lines = (json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PROMPTS, "".join(lines))

    def launch_settings(self, start: int, path: str) -> dict[str, Any]:
        workers = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        scheduler_steps = self.run.steps * self.updates
        return {
            "env": workers | self.config.env | {"PYTHONPATH": path},
            "gpus": command.gpus_needed(self.run, self.config),
            "control": {"start": start, "seed": self.run.seed + start, "scheduler_steps": scheduler_steps},
        }

    def step_logged(self, step: int, metrics: dict[str, float], check: bool = False) -> None:
        """Record the metrics of a step. Raises ``BackendError`` if the engines should be ``check``-ed and sample from
        other weights than the actor's.
        """
        super().step_logged(step, metrics, check)
        bound, found = self.config.max_vllm_kl, metrics.get("vllm_kl")
        if check and bound is not None and found is not None and not abs(found) <= bound:
            raise trainer_failed(
                f"step {step}: vllm_kl is {found:.2g}, above the bound {bound:g}: the engines sample from other "
                "weights than the actor's. If the cause is their precision, raise backend.max_vllm_kl"
            )
