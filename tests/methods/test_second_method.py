"""methods/loop: another method through the same loop, session and checkpoints: REINFORCE on the judge's final score."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strop.engine.config.find import load
from strop.engine.data.embeddings import Embeddings, TrainingPrompts
from strop.engine.methods.loop import train
from strop.engine.methods.models import Models
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
        self.schedule = models.schedule(config.rollout)
        self.rngs = {"rollout": torch.Generator().manual_seed(config.run.seed)}

    def learning_rate(self, iteration):
        return self.config.optim.lr

    def collect(self, iteration):
        models, schedule, parts = self.models, self.schedule, []
        self.cond = self.prompts.mine(iteration)
        x = schedule.prior((len(self.cond), *models.policy.latent_shape), self.rngs["rollout"])
        with models.policy.sampling(self.cond, text_kv=True) as known:
            for step in range(schedule.num_steps):
                eps = models.policy.eps(x, schedule.timesteps(step, len(x)), known, schedule.guided)
                x_prev = schedule.branch(x, eps, step, 1, self.rngs["rollout"])[0]
                each = torch.arange(len(x))
                parts.append(Steps(x, x_prev, torch.full_like(each, step), each, torch.zeros(len(x))))
                x = x_prev
            reward = models.judge.score_images(models.diffusion.decode(x)[None], self.cond.judge, 0)[0]
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        steps = Steps.cat([replace(part, advantage=advantage) for part in parts])
        return steps, {"prompts": len(self.cond), "reward": reward.mean()}

    def batches(self, steps):
        return steps.shuffle(self.rngs["rollout"]).split(self.config.optim.micro_batch)

    def loss(self, batch):
        policy, schedule = self.models.policy, self.schedule
        t = schedule.timesteps(batch.step, len(batch))
        eps = policy.eps(batch.x, t, self.cond[batch.prompt], schedule.guided).unsqueeze(1)  # (G, 1, N, C, H, W)
        log_prob = schedule.log_prob(batch.x_prev[None], batch.x[None], eps, batch.step)[0]  # (N,)
        loss = -(batch.advantage * log_prob).mean()
        return loss, {"loss": loss}

    def measure(self, done):
        return {}


def run(arguments):
    config = load(arguments[0], arguments[1:])
    with Session.start(config) as session:
        models = Models.load(config, session.ranks.device)
        embeddings = Embeddings(models.diffusion, models.judge, [TEXTS])
        prompts = TrainingPrompts(TEXTS, embeddings, config.rollout.prompts, config.run.seed, session.ranks)
        method = Reinforce(config, models, prompts)
        session.open()
        settings = AdamWSettings.of(config)
        train(session, method, build_optimizer(models.policy.unet, settings, session.ranks))
        return models.policy.lora_state(), read_records(session.metrics.path), session.summary()


def test_a_second_method_trains_logs_and_resumes_bit_for_bit(recipe, tmp_path, capsys):
    keys = ("rollout.num_steps=4", "optim.lr=1e-3", "optim.micro_batch=3")
    whole, records, summary = run(recipe("run.iterations=3", *keys))
    assert "reward" in capsys.readouterr().out
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert all(record[name] is not None for record in records for name in ("reward", "loss", "grad_norm"))
    assert (summary["prompts"], summary["optimizer_steps"]) == (6, 9)  # 2 prompts, 4 steps in micro-batches of 3
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)
    parts = (f"run.dir={tmp_path / 'parts'}", *keys)
    run(recipe("run.iterations=2", *parts))
    resumed, *_ = run(recipe("run.iterations=3", "run.resume=true", *parts))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
