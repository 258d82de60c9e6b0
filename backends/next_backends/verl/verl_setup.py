"""What all verl processes of one run share: prompts, rewards, overrides, launch settings."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from next_backends.data import is_chat
from next_backends.external.trainer_setup import TrainerSetup
from next_backends.verl import command
from next_core.storage.atomic import write_text

TRAINER_SIDE = Path(__file__).parent / "trainer_side"


class VerlSetup(TrainerSetup):
    """Prepares the trainers of a run, which work in ``folder``."""

    trainer_side = TRAINER_SIDE
    check_run = staticmethod(command.check_run)

    def states(self, start: int) -> Path:
        return self.folder / "checkpoints"

    def options(self, start: int, load: bool = False) -> list[str]:
        folder = self.states(start)
        template = {} if is_chat(self.rows) else {"+actor_rollout_ref.model.custom_chat_template": command.TEXT}
        validation = [self._file(split) for split in self.splits] or [self._file("train")]
        facts = {
            "data.train_files": self._file("train"),
            "data.val_files": validation,
            "reward.custom_reward_function.path": TRAINER_SIDE / "reward.py",
            "trainer.default_local_dir": folder,
            "trainer.max_actor_ckpt_to_keep": 3,
            "trainer.resume_mode": "resume_path" if load else "disable",
            "trainer.resume_from_path": folder / f"global_step_{start}" if load else None,
            "trainer.save_freq": self.run.save_every or self.run.steps,  # verl saves after the last step, too
            **template,
        }
        given = {key: ("`next-core run`", value) for key, value in facts.items()}
        return command.make_overrides(self.run, self.config, given)

    def write_prompts(self, start: int = 0) -> None:
        """Write the prompts of each split as verl reads them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for split, rows in {"train": self.rows, **self.splits}.items():
            write_text(Path(self._file(split)), "".join(_lines(split, rows)))

    def environment(self) -> dict[str, str]:
        assert self.rewards is not None
        return super().environment() | {"NEXT_CORE_REWARD": self.rewards.url}

    def _file(self, split: str) -> str:
        return str(self.folder / f"{split}.jsonl")


def _lines(split: str, rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        prompt = row["prompt"]
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        facts = {
            "data_source": split,
            "prompt": chat,
            "reward_model": {"style": "rule", "ground_truth": str(row["answer"])},
            "extra_info": {"prompt": text},
        }
        yield json.dumps(facts) + "\n"
