"""What all recipes of engine/train.py have: every key with its meaning, its default and its bounds.

A method's own keys are in config/methods/, a file each. The classes do not know what the keys do: the modules that
receive a section do. docs/configuration.md is generated from these files and config/judge_training.py.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .settings import Section

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Kernels = Literal["auto", "reference"]
Tracker = Literal["tensorboard", "wandb", "none"]
Resume = Annotated[  # yes and no are words in YAML 1.2
    Literal[False, True, "auto", "newest_whole"], BeforeValidator(lambda v: {"yes": True, "no": False}.get(str(v), v))
]
KERNELS = (
    "Which code computes the ops of strop.kernels: auto takes Triton's on a GPU, reference plain PyTorch everywhere, "
    "which is slower and helps to find errors."
)
TRACKER = (
    "Where the lines of metrics.jsonl are shown as well: TensorBoard (files in run.dir/tensorboard), Weights & Biases, "
    "or nowhere. wandb needs the extra strop[wandb], and stays offline where it has no login."
)
RESUME = (
    "Whether the run goes on from the newest checkpoint in run.dir. auto begins a run where there is none, so that one "
    "line begins a run and restarts it. newest_whole passes over damaged checkpoints."
)
PROMPT_FILE = (
    "a JSON list of {caption: ...}, JSON lines of the same, a table (.csv, .tsv) with a column prompt or caption, or a "
    "text of one prompt a line."
)
RANK_TIMEOUT = "Seconds that processes wait for one another; when one sleeps for longer, the others name it and end."
Momentum = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10_000)]  # of what is in memory at once
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Timestep = Annotated[int, Field(ge=0, le=999)]
Pixels = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class ModelConfig(Section):
    path: str = Field(
        description="Base model, Stable Diffusion 1.5 or SDXL or a fine-tune of either: a folder in diffusers format, "
        "one .safetensors checkpoint, or a hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    components: str | None = Field(
        None,
        description="Folder or hub id of a model with the architecture of a .safetensors checkpoint, whose "
        "configuration and tokenizers go with it; null takes those of the original model from the hub.",
    )
    vae: str | None = Field(
        None, description="VAE in place of the model's: a folder, a .safetensors file, or a hub id."
    )
    dtype: Dtype = Field(
        "float32",
        description="Type of the frozen weights; the LoRA is in float32 and multiplied in this type. float16 puts "
        "an eighth of the noise on the log-ratio that bfloat16 does (`python -m strop.bench.precision`). With float16, "
        "a VAE that overflows in it (SDXL's) stays in float32, and gradients pass through the UNet scaled up.",
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        "auto", description="Attention of the UNet. auto is PyTorch's SDPA; xformers needs the extra strop[cuda]."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Whether the backward pass recomputes the UNet's activations: less memory, a third more time.",
    )
    decode_rows: int | None = Field(
        None, ge=1, description="Most latents in one forward of a decoder; fewer take less memory. null decodes all."
    )
    unet_rows: int | None = Field(
        None,
        ge=2,
        description="Most rows in one forward pass of the UNet in rollout and evaluation; fewer take less memory. A "
        "guided latent takes two rows, with the prompt and without. null computes all branches in one pass.",
    )
    merge_lora: bool | None = Field(
        None,
        description="Whether rollout and evaluation add the LoRA to the UNet's weights instead of computing it "
        "beside them, which needs a second copy of them. In float32 the numbers are the same but for rounding; in "
        "float16 and bfloat16 the sums are rounded to that type, which is an approximation. null adds in float32 "
        "alone.",
    )
    share_halves: bool = Field(
        True,
        description="Whether guidance computes once what the passes with and without the prompt have in common, which "
        "is all before the first cross-attention: a fortieth of SD-1.5's UNet, nothing of SDXL's. The numbers are the "
        "same but for rounding.",
    )
    channels_last: bool = Field(
        False,
        description="Whether UNet and VAE use the memory order NHWC. The numbers are the same but for rounding. It was "
        "slower on a CPU, and on an H200, where SD-1.5's decoder took 1.4 times as long.",
    )
    fold_upsample: bool = Field(
        True,
        description="Whether UNet and VAE compute an upsampling and the 3x3 convolution after it as one transposed "
        "convolution. It takes 4/9 of the operations and a second copy of these weights (0.1 GB of SD-1.5 in float16); "
        "the numbers are the same but for rounding. Faster on a CPU; on an H200 it takes 8 % off SD-1.5's decoder.",
    )
    compile: Literal[False, "judge_and_decoder", "all"] = Field(
        False,
        description="What torch.compile compiles: the judge's image tower and the VAE decoder, or (all) the UNet too, "
        "which takes minutes at the start of a run, less where PyTorch finds the cache of an earlier one "
        "(TORCHINDUCTOR_CACHE_DIR). On two CPU cores all took four minutes and then saved 8 % of an iteration of "
        "tinyworld; it is not yet measured on a GPU.",
    )
    tf32: bool | None = Field(
        None,
        description="Whether a GPU multiplies float32 matrices, such as the judge's, in TF32, as published. null does "
        "so unless dtype is float32, because that is chosen for its precision.",
    )
    height: Pixels | None = Field(None, description="Height of the images in pixels; null takes the model's.")
    width: Pixels | None = Field(None, description="Width of the images in pixels; null takes the model's.")

    @property
    def uses_tf32(self) -> bool:
        """Whether TF32 is on: tf32, or where that is null whether dtype is not float32."""
        return self.dtype != "float32" if self.tf32 is None else self.tf32

    @property
    def merges_lora(self) -> bool:
        """Whether the LoRA is merged: merge_lora, or where that is null whether dtype is float32."""
        return self.dtype == "float32" if self.merge_lora is None else self.merge_lora


class JudgeConfig(Section):
    path: str = Field(
        description="The preference model: a folder written by engine/train_judge.py, a PickScore or CLIP folder or "
        "hub id, or a .bin file of the paper's authors."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    components: str | None = Field(
        None,
        description="Folder or hub id of the CLIP whose config.json, preprocessor and tokenizer go with judge.path; "
        "null if judge.path has its own.",
    )
    kind: Literal["spm", "spm_no_step", "pickscore", "latent"] = Field(
        "spm",
        description="What the judge is: spm is SPO's step-aware preference model, spm_no_step the same model trained "
        "without the timestep, pickscore a plain CLIP; latent is a UNet's encoder that reads the noisy latents "
        "themselves, as LPO's, so that the rollout neither looks ahead nor decodes.",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        description="Of a latent judge: guidance scale of its middle feature; 1 leaves out the half without the prompt "
        "and half of the cost. null takes that with which the judge was trained, 7.5 for LPO's.",
    )
    dtype: Dtype | None = Field(
        None,
        description="Type of the judge's networks; scores are in float32. null is float32, of a latent judge "
        "model.dtype. float16 finds the best branch of float32 in about 99 % of tinyworld's pools, bfloat16 in 93 % "
        "(`python -m strop.bench.judge_precision`).",
    )

    def computed_in(self, model: ModelConfig) -> Dtype:
        """Returns the type of the judge's networks beside this base model: dtype, or where that is null its default."""
        return self.dtype or (model.dtype if self.kind == "latent" else "float32")


class HeldoutConfig(Section):
    heldout: str | None = Field(
        None,
        description="File of prompts for the evaluation, in the same forms; none may be a training prompt. null takes "
        "evaluate.prompts of the training prompts, which are then not trained on.",
    )


class LoraConfig(Section):
    rank: int = Field(4, ge=1, le=1024, description="Rank of the LoRA; its alpha is equal, so that its scale is 1.")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="UNet layers that get a LoRA, by the endings of their names, as in PEFT.",
    )


class OptimConfig(Section):
    lr: float = Field(6e-5, gt=0, description="AdamW learning rate.")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay, which pulls the LoRA towards 0.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradient norm above which gradients are scaled down; null leaves them."
    )
    micro_batch: Count = Field(10, description="Rows per backward pass and process; fewer take less memory.")


class ZeroConfig(Section):
    stage: Literal[1, 2] = Field(
        1,
        description="DeepSpeed ZeRO stage with several processes: 1 shards the optimizer state, 2 also the gradients, "
        "but for those that wait for a step (optim.accumulate).",
    )


class EvaluateConfig(Section):
    prompts: int = Field(64, ge=1, le=100_000, description="Held-out prompts, from the top of prompts.heldout.")
    num_steps: int = Field(20, ge=1, le=1000, description="Deterministic DDIM steps (eta 0) per image.")
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale of the evaluation.")
    batch: Count = Field(32, description="Images per forward pass; fewer take less memory.")
    seed: Seed = Field(0, description="Seed of the initial noise, which is the same for base and tuned model.")
    pictures: int = Field(10, ge=1, le=1000, description="Prompts whose images before_after.png shows.")
    scorers: tuple[str, ...] = Field(
        (),
        description="Scorers beside the judge, all but the first independent of it: pickscore, hpsv2, hpsv2.1, "
        "image_reward, aesthetic, clip_score, each also as name=weights with a file, folder or hub id; or "
        "`module:factory`, code that is imported and run: factory(device) returns score(images, prompts) -> {name: "
        "scores (N,)}.",
    )
    every: int | None = Field(
        None,
        ge=1,
        description="Iterations between evaluations while training, on the first evaluate.watched held-out prompts. "
        "Each writes a checkpoint and samples/<iteration>.png. null evaluates before and after the training alone.",
    )
    watched: int = Field(16, ge=8, le=10_000, description="Held-out prompts of the evaluations while training.")
    patience: int = Field(2, ge=1, description="Wrong evaluations in a row (docs/guide.md) until there is a warning.")
    stop: bool = Field(
        False,
        description="Whether such a warning ends the run; lora/ then has the LoRA of its best evaluation, lora_last/ "
        "that of its end.",
    )


class RunConfig(Section):
    dir: str = Field(description="Run folder, which must be new or empty unless run.resume is set.")
    iterations: int = Field(ge=1, description="Rollouts, each followed by the optimizer steps on what it gave.")
    seed: Seed = Field(42, description="Seed of everything random in the run; process r uses seed + r.")
    device: Device = Field("auto", description="Where the run computes; auto takes a GPU where there is one.")
    kernels: Kernels = Field("auto", description=KERNELS)
    log_every: int = Field(1, ge=1, description="Iterations per line of metrics.jsonl and of the terminal.")
    tracker: Tracker = Field("tensorboard", description=TRACKER)
    save_every: int = Field(10, ge=1, description="Iterations per checkpoint; one more is written at the end.")
    keep: int | None = Field(
        None,
        ge=1,
        description="How many of the newest checkpoints stay (SDXL's take 1.1 GB each), beside that of the best "
        "evaluation where evaluate.every is set; null keeps all.",
    )
    resume: Resume = Field(False, description=RESUME)
    rank_timeout: int = Field(600, ge=5, description=RANK_TIMEOUT)
    share_of_peak: bool = Field(
        False,
        description="Whether a run on a GPU that plan knows reports the share of its peak that it reaches. Another "
        "process then counts the operations of the recipe, for a quarter to half a minute.",
    )


class Config(Section):
    """What the recipes of all methods of engine/train.py have. A method's own class is in config/methods/.

    name: what the method is called; title: the same in words, with its source; code: where in methods/ it is, as
    module:class.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    code: ClassVar[str]

    method: str = Field("spo", description="How the policy is trained; of a recipe that does not say so, spo.")
    model: ModelConfig
    judge: JudgeConfig
    prompts: HeldoutConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig

    @property
    def iterations(self) -> int:
        """The number of iterations of the run."""
        return self.run.iterations

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self.optim.accumulate

    @property
    def prompts_per_iteration(self) -> int:
        """The prompts that a process samples for in an iteration: none, unless the method draws its own samples."""
        return 0

    @property
    def rewarded_by(self) -> str | None:
        """The scorer that rewards what is trained, as evaluate.scorers names it; None where the judge does."""
        return None

    @property
    def auditor(self) -> JudgeConfig | None:
        """A second judge, with which the judge is compared; None where the method or the recipe has none."""
        return None

    @property
    def text_kv(self) -> bool:
        """Whether keys and values of a prompt are computed once for a batch of the evaluation."""
        return True

    @property
    def guided_update(self) -> bool:
        """Whether the update computes both guidance halves."""
        return False

    @property
    def files_read(self) -> dict[str, str]:
        """Files or folders of data that the run reads, by key."""
        return {"prompts.heldout": self.prompts.heldout} if self.prompts.heldout else {}

    @property
    def models_read(self) -> dict[str, str]:
        """Folders or hub ids of models that the run reads beside base model and judge, by key."""
        return {}

    def in_words(self, ranks: int) -> str:
        """Returns what an iteration does, as a run announces it."""
        raise NotImplementedError
