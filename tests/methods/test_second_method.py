"""methods/loop: another method through the same loop, session and checkpoints: REINFORCE on the judge's final score."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from strop.engine.config.training import Config
from strop.engine.data.embeddings import Embeddings, TrainingPrompts
from strop.engine.methods.loop import train
from strop.engine.methods.online import OnlineModels
from strop.engine.rows import Rows, rows
from strop.engine.runtime.columns import GRAD_NORM, PROMPTS, Column
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.session import Session

TEXTS = ["a b", "c d", "e", "f g"]


@dataclass(frozen=True, slots=True)
class Steps(Rows):
    """Steps of trajectories: x (N, C, H, W) at `step`, after it x_prev; prompt: a row of the conditioning."""

    x: Tensor = rows()
    x_prev: Tensor = rows()
    step: Tensor = rows()
    prompt: Tensor = rows()
    advantage: Tensor = rows()


class Reinforce:
    stage = "rollout"
    columns = (PROMPTS, Column("reward", heading="reward", form="{:.3f}"), Column("loss"), GRAD_NORM)

    def __init__(self, config, models, prompts):
        self.config, self.models, self.prompts, self.trainable = config, models, prompts, models.trainable
        self.rngs = {"rollout": torch.Generator().manual_seed(config.run.seed)}

    def learning_rate(self, iteration):
        return self.config.optim.lr

    def collect(self, iteration):
        models, schedule, made = self.models, self.models.schedule, []
        self.cond = self.prompts.mine(iteration)
        x = schedule.prior((len(self.cond), *models.policy.latent_shape), self.rngs["rollout"])
        with models.policy.sampling(self.cond, text_kv=True) as known:
            for step in range(schedule.num_steps):
                eps = models.policy.eps(x, schedule.timesteps(step, len(x)), known, schedule.guided)
                x_prev = schedule.branch(x, eps, step, 1, self.rngs["rollout"])[0]
                each = torch.arange(len(x))
                made.append(Steps(x, x_prev, torch.full_like(each, step), each, torch.zeros(len(x))))
                x = x_prev
            reward = models.judge.score_images(models.diffusion.decode(x)[None], self.cond.judge, 0)[0]
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        steps = Steps.cat([replace(part, advantage=advantage) for part in made])
        return steps, {"prompts": len(self.cond), "reward": reward.mean()}

    def batches(self, steps):
        return steps.shuffle(self.rngs["rollout"]).split(self.config.optim.micro_batch)

    def loss(self, batch):
        policy, schedule = self.models.policy, self.models.schedule
        t = schedule.timesteps(batch.step, len(batch))
        eps = policy.eps(batch.x, t, self.cond[batch.prompt], schedule.guided).unsqueeze(1)  # (G, 1, N, C, H, W)
        log_prob = schedule.log_prob(batch.x_prev[None], batch.x[None], eps, batch.step)[0]  # (N,)
        loss = -(batch.advantage * log_prob).mean()
        return loss, {"loss": loss}

    def measure(self, done):
        return {}


@pytest.fixture
def recipe(tiny_folder, clip_folder, tmp_path):
    """The recipe of a run named so, of so many iterations."""

    def made(name, iterations, **run):
        return Config.model_validate(
            {
                "model": {"path": str(tiny_folder)},
                "judge": {"path": str(clip_folder), "kind": "pickscore"},
                "prompts": {"train": "none"},
                "rollout": {"prompts": 2, "num_steps": 4},
                "optim": {"lr": 1e-3, "micro_batch": 3},
                "run": {"dir": str(tmp_path / name), "iterations": iterations, "device": "cpu", "save_every": 1, **run},
            }
        )

    return made


def run(config):
    with Session.start(config) as session:
        models = OnlineModels.load(config, session.ranks.device)
        embeddings = Embeddings(models.diffusion, models.judge, [TEXTS])
        prompts = TrainingPrompts(TEXTS, embeddings, config.rollout.prompts, config.run.seed, session.ranks)
        method = Reinforce(config, models, prompts)
        session.open(method.trainable)
        settings = AdamWSettings.of(config.optim, 1, "float32")
        train(session, method, build_optimizer(models.policy.unet, settings, session.ranks))
        return models.policy.lora_state(), read_records(session.metrics.path), session.summary()


def test_a_second_method_trains_logs_and_resumes_bit_for_bit(recipe, capsys):
    whole, records, summary = run(recipe("whole", 3))
    assert "reward" in capsys.readouterr().out
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert all(record[name] is not None for record in records for name in ("reward", "loss", "grad_norm"))
    assert (summary["prompts"], summary["optimizer_steps"]) == (6, 9)  # 2 prompts, 4 steps in micro-batches of 3
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)
    run(recipe("parts", 2))
    resumed, *_ = run(recipe("parts", 3, resume=True))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
